// Command licenses prints the licence texts of all that is linked into service-proxy-agent: of each
// Go module, and of Go itself. The archive and the packages bring it as THIRD_PARTY_LICENSES.
// It fails where a module has no licence.
//
//	go run ./deploy/licenses
//
// What each text says, and whether it may be linked in, somebody must have read.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const program = "./cmd/service-proxy-agent"

// timeLimit has room for modules that must be downloaded first.
const timeLimit = 5 * time.Minute

func main() {
	ctx, stop := context.WithTimeout(context.Background(), timeLimit)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "licenses:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) error {
	all, err := linked(ctx, "amd64", "arm64")
	if err != nil {
		return err
	}
	said, err := ask(ctx, "amd64", "env", "GOVERSION", "GOROOT")
	if err != nil {
		return err
	}
	version, root, _ := strings.Cut(strings.TrimSpace(said.String()), "\n")
	all = append(all, source{name: "Go", version: version, root: os.DirFS(root),
		folders: []string{"."}})
	return write(out, all)
}

// ask is what the go command says, as it would build for that architecture.
func ask(ctx context.Context, arch string, args ...string) (*bytes.Buffer, error) {
	c := exec.CommandContext(ctx, "go", args...)
	c.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	var said, stderr bytes.Buffer
	c.Stdout, c.Stderr = &said, &stderr
	if err := c.Run(); err != nil {
		return nil, fmt.Errorf("go %s: %w: %s", args[0], err, stderr.String())
	}
	return &said, nil
}

// source is a module with the folders of it that are linked in.
type source struct {
	name, version string
	root          fs.FS
	folders       []string
}

// linked are the modules of which a package is in the program, on any of these architectures.
func linked(ctx context.Context, architectures ...string) ([]source, error) {
	by := map[string]*source{}
	for _, arch := range architectures {
		said, err := ask(ctx, arch, "list", "-deps", "-json=Dir,ImportPath,Module,Standard", program)
		if err != nil {
			return nil, err
		}
		if err := read(said, by); err != nil {
			return nil, fmt.Errorf("read the list of packages: %w", err)
		}
	}
	all := make([]source, 0, len(by))
	for _, s := range by {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b source) int { return cmp.Compare(a.name, b.name) })
	return all, nil
}

// read adds what `go list -json` says to by.
func read(list io.Reader, by map[string]*source) error {
	for d := json.NewDecoder(list); ; {
		var p struct {
			Dir, ImportPath string
			Standard        bool
			Module          *struct {
				Path, Version, Dir string
				Main               bool
			}
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if p.Standard || p.Module != nil && p.Module.Main {
			continue
		}
		if p.Module == nil {
			return fmt.Errorf("package %q is of no module", p.ImportPath)
		}
		folder, err := filepath.Rel(p.Module.Dir, p.Dir)
		if err != nil {
			return err
		}
		s := by[p.Module.Path]
		if s == nil {
			s = &source{name: p.Module.Path, version: p.Module.Version, root: os.DirFS(p.Module.Dir)}
			by[s.name] = s
		}
		if !slices.Contains(s.folders, folder) {
			s.folders = append(s.folders, folder)
		}
	}
}

var (
	licenceRE = regexp.MustCompile(`(?i)^(un)?licen[cs]e|^copying`)
	besideRE  = regexp.MustCompile(`(?i)^(notice|patents|copyright)`)
	// Code, or a list made by a tool, is not a text of law.
	otherRE = regexp.MustCompile(`(?i)\.(go|html|json|ya?ml|tmpl)$`)
)

// text is a file as the module has it.
type text struct{ name, body string }

// texts are the licences and notices of what is linked in: those of its folders, and of all above.
func (s source) texts() ([]text, error) {
	folders := map[string]bool{}
	for _, f := range s.folders {
		for ; !folders[f]; f = path.Dir(f) {
			folders[f] = true
		}
	}
	var all []text
	licensed := false
	for f := range folders {
		entries, err := fs.ReadDir(s.root, f)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", s.name, err)
		}
		for _, e := range entries {
			licence := licenceRE.MatchString(e.Name())
			if !e.Type().IsRegular() || otherRE.MatchString(e.Name()) ||
				!licence && !besideRE.MatchString(e.Name()) {
				continue
			}
			body, err := fs.ReadFile(s.root, path.Join(f, e.Name()))
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", s.name, err)
			}
			licensed = licensed || licence
			all = append(all, text{path.Join(f, e.Name()), strings.TrimSpace(
				strings.ReplaceAll(string(body), "\r\n", "\n"))})
		}
	}
	if !licensed {
		return nil, fmt.Errorf("%s %s has no licence: there is no LICENSE or COPYING in it", s.name,
			s.version)
	}
	slices.SortFunc(all, func(a, b text) int { return cmp.Compare(a.name, b.name) })
	return all, nil
}

const head = `Software of others in service-proxy-agent
=========================================

The program service-proxy-agent is licensed under the Apache License 2.0, which is in LICENSE.
Linked into it are Go's standard library and the modules below, under the licences that follow
them.

Beside the program this archive or package may bring Envoy, https://www.envoyproxy.io, a program of
its own: Copyright (c) 2017 Lyft Inc. All rights reserved. Licensed under the Apache License 2.0.
`

// write prints each text once, under the names of all that have it.
func write(out io.Writer, all []source) error {
	owners, order := map[string][]string{}, []string(nil)
	var missing []error
	for _, s := range all {
		texts, err := s.texts()
		missing = append(missing, err)
		for _, t := range texts {
			if owners[t.body] == nil {
				order = append(order, t.body)
			}
			owners[t.body] = append(owners[t.body], s.name+" "+s.version+": "+t.name)
		}
	}
	if err := errors.Join(missing...); err != nil {
		return err
	}
	b := bytes.NewBufferString(head)
	for _, body := range order {
		line := strings.Repeat("-", 80)
		fmt.Fprintf(b, "\n%s\n%s\n%s\n\n%s\n", line, strings.Join(owners[body], "\n"), line, body)
	}
	_, err := out.Write(b.Bytes())
	return err
}
