//go:build lab

package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/docs"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// notHere are the commands whose examples are not run in a lab, where only the network is a VM's
// own: why, and the unit test TestExamples still parses them.
var notHere = map[string]string{
	"run":       "one runs already",
	"bootstrap": "it would install on this machine",
	"envoy":     "the Envoy of this lab runs without it",
}

// silent are the words of lines that say nothing where all is well.
var silent = []string{"wait", "drain", "--html"}

// TestHelpExamples does what --help of each command says one may type, and the documents where
// test/docs/commands.txt says nothing else.
func TestHelpExamples(t *testing.T) {
	t.Parallel()
	m, a := start(t, mesh.Options{Config: services()})
	must(t, a.WaitReady(within(t, 30*time.Second)))
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "new.json"), []byte(`{"service": {}}`), 0o600))
	examples := helpExamples(t, a)
	if len(examples) < 10 {
		t.Fatalf("examples of %q alone", slices.Sorted(maps.Keys(examples)))
	}
	for _, line := range docs.InLab(t, "../..") {
		line = strings.ReplaceAll(line, "ADDRESS:PORT", "10.10.0.1:80")
		if words := docs.Words(line); !slices.Contains(examples[words[1]], line) {
			examples[words[1]] = append(examples[words[1]], line)
		}
	}
	names := slices.Sorted(maps.Keys(examples))
	// What makes a file before what reads one, and what takes the rules out at last.
	rank := map[string]int{"bundle": -1, "cleanup": 1}
	slices.SortStableFunc(names, func(a, b string) int { return rank[a] - rank[b] })
	for _, name := range names {
		if notHere[name] != "" {
			continue
		}
		for _, line := range examples[name] {
			words := docs.Words(line)
			out, code := example(t, m, a, dir, words)
			quiet := slices.ContainsFunc(words, func(w string) bool { return slices.Contains(silent, w) })
			if code < 0 || code >= 64 || out == "" && !quiet ||
				strings.Contains(out, "no such file") {
				t.Errorf("%s: exit code %d\n%s", line, code, out)
			}
		}
	}
}

// helpExamples are the example lines of each command, by --help.
func helpExamples(t *testing.T, a *mesh.Agent) map[string][]string {
	t.Helper()
	listed, _, _, err := a.Run(t.Context(), "__complete", "")
	must(t, err)
	all := map[string][]string{}
	for line := range strings.Lines(listed) {
		name, _, found := strings.Cut(line, "\t")
		if !found || strings.HasPrefix(name, "-") {
			continue
		}
		help, stderr, code, err := a.Run(t.Context(), name, "--help")
		if err != nil || code != 0 || stderr != "" {
			t.Fatalf("%s --help: %v, exit code %d, %s", name, err, code, stderr)
		}
		_, section, _ := strings.Cut(help, "\nExamples:\n")
		section, _, _ = strings.Cut(section, "\n\n")
		for example := range strings.Lines(section) {
			example = strings.TrimPrefix(strings.TrimSpace(example), "sudo ")
			if !strings.HasPrefix(example, "#") {
				all[name] = append(all[name], example)
			}
		}
	}
	return all
}

// example runs a line. What goes on until somebody ends it (--watch, --serve) is ended by Ctrl-C
// once it has said something.
func example(t *testing.T, m *mesh.Mesh, a *mesh.Agent, dir string, words []string) (
	said string, code int,
) {
	t.Helper()
	binary, err := mesh.Binary()
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := m.VM.Command(ctx, binary, words[1:]...)
	cmd.Dir, cmd.Env = dir, append(a.Environ(), a.Settings()...)
	goesOn := slices.ContainsFunc(words, func(word string) bool {
		return strings.HasPrefix(word, "--watch") || strings.HasPrefix(word, "--serve")
	})
	read, write, err := os.Pipe()
	must(t, err)
	defer read.Close()
	cmd.Stdout, cmd.Stderr = write, write
	must(t, lab.Start(cmd))
	write.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := read.Read(buffer)
		if n > 0 && goesOn && said == "" {
			must(t, cmd.Process.Signal(syscall.SIGINT))
		}
		said += string(buffer[:n])
		if err != nil { // its end
			break
		}
	}
	if err := cmd.Wait(); err != nil && ctx.Err() != nil {
		said += fmt.Sprintf("\nafter a minute: %v", err)
	}
	return said, cmd.ProcessState.ExitCode()
}
