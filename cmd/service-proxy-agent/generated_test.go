package main

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/man and deploy/completion")

// TestGenerated: the manual and the shells' completion, which the archive brings, are made of the
// commands. `make generated` writes them.
func TestGenerated(t *testing.T) {
	root := rootCommand()
	var bash, zsh, fish bytes.Buffer
	for _, err := range []error{root.GenBashCompletionV2(&bash, true), root.GenZshCompletion(&zsh),
		root.GenFishCompletion(&fish, true)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	compare(t, "../../deploy/completion", map[string]string{
		"service-proxy-agent.bash": unquoted(t, bash.String()),
		"_service-proxy-agent":     zsh.String(),
		"service-proxy-agent.fish": escaped(t, fish.String()),
	})
	compare(t, "../../docs/man", manPages(root))
}

// unquoted is cobra's script for bash with , and [ left as they are typed. It quotes them by
// printf's %q, so that a second check of --ignore and an IPv6 address were never completed.
func unquoted(t *testing.T, script string) string {
	t.Helper()
	const plain = "%[1]s=${%[1]s//\\\\,/,}; %[1]s=${%[1]s//\\\\[/[}; %[1]s=${%[1]s//\\\\]/]}\n"
	for line, variable := range map[string]string{
		"printf -v comp \"%q\" \"${compline%%$tab*}\" &>/dev/null || " +
			"comp=$(printf \"%q\" \"${compline%%$tab*}\")\n": "comp",
		"COMPREPLY[0]=$(printf \"%q\" \"${COMPREPLY[0]%%$tab*}\")\n": "COMPREPLY[0]",
	} {
		if strings.Count(script, line) != 1 {
			t.Fatalf("cobra's script is another now: no %q", line)
		}
		script = strings.Replace(script, line, line+"        "+fmt.Sprintf(plain, variable), 1)
	}
	return script
}

// escaped is cobra's script for fish with the words before the last one quoted again. It hands them
// to eval as they are, so that a Tab behind a completed name like $(reboot) ran what is in it.
func escaped(t *testing.T, script string) string {
	t.Helper()
	const words = "set -l args (commandline -opc)\n"
	if strings.Count(script, words) != 1 {
		t.Fatalf("cobra's script is another now: no %q", words)
	}
	return strings.Replace(script, words, "set -l args (string escape -- (commandline -opc))\n", 1)
}

// compare a folder with what it should hold.
func compare(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, wanted := want[e.Name()]; wanted {
			continue
		}
		if !*update {
			t.Errorf("%s/%s is of no command; run `make generated`", dir, e.Name())
		} else if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		file := filepath.Join(dir, name)
		if *update {
			if err := os.WriteFile(file, []byte(want[name]), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if have, err := os.ReadFile(file); err != nil || string(have) != want[name] {
			t.Errorf("%s is not what the commands say (%v); run `make generated`", file, err)
		}
	}
}

// TestManual: each page has the sections that people look for. `make lint` asks mandoc.
func TestManual(t *testing.T) {
	for name, page := range manPages(rootCommand()) {
		at := 0
		for _, section := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "\"EXIT STATUS\"",
			"ENVIRONMENT", "FILES", "EXAMPLES", "\"SEE ALSO\""} {
			next := strings.Index(page[at:], "\n.SH "+section+"\n")
			if next < 0 {
				t.Errorf("%s has no section %s, or in another place", name, section)
				continue
			}
			at += next
		}
		if strings.Contains(page, "\n\n") || strings.Contains(page, "`") {
			t.Errorf("%s has an empty line or a backtick:\n%s", name, page)
		}
	}
}

// TestNotLinked: what makes pages is no part of the program.
func TestNotLinked(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	packages := strings.Fields(string(out))
	if !slices.Contains(packages, "github.com/spf13/cobra") {
		t.Fatalf("no list of packages: %q", packages)
	}
	for _, p := range packages {
		for _, no := range []string{"cobra/doc", "md2man", "blackfriday"} {
			if strings.Contains(p, no) {
				t.Errorf("the program has %s", p)
			}
		}
	}
}
