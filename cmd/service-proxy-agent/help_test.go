package main

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal/terminaltest"
)

// everyCommand is the root and what can be seen below it.
func everyCommand(t *testing.T) []*cobra.Command {
	t.Helper()
	root := rootCommand()
	root.InitDefaultHelpCmd()
	all := append([]*cobra.Command{root}, root.Commands()...)
	if len(all) < 10 {
		t.Fatalf("only %d commands", len(all))
	}
	return all
}

// TestHelp: each command says what it does, its exit codes and examples, in lines that fit.
func TestHelp(t *testing.T) {
	for _, c := range everyCommand(t) {
		t.Run(c.Name(), func(t *testing.T) {
			terminaltest.Fits(t, func(out io.Writer, style terminal.Style, width int) error {
				_, err := io.WriteString(out, helpText(c, style, width))
				return err
			})
			about := says(c)
			if len(about.text) == 0 || c.Long == "" {
				t.Error("no Long")
			}
			codes := map[string]bool{}
			for _, e := range about.exits {
				codes[e.code] = e.meaning != ""
			}
			if !codes["0"] || !codes["64"] {
				t.Errorf("its Long has no paragraph like \"Exit code: 0 done; 64 wrong usage.\": %v",
					about.exits)
			}
			c.Flags().VisitAll(func(f *pflag.Flag) {
				// Tab, the manual and --help take what the usage quotes first for the value's name.
				name, _ := pflag.UnquoteUsage(f)
				if name != "" && (strings.ContainsAny(name, " -") || name != strings.ToUpper(name)) {
					t.Errorf("the value of --%s is called %q", f.Name, name)
				}
			})
			if strings.TrimSpace(c.Example) == "" {
				t.Error("no Example")
			}
			if strings.HasSuffix(c.Short, ".") || strings.Contains(c.Short, "exit code") ||
				len(c.Short) > 85 {
				t.Errorf("Short is one line of a list: %q", c.Short)
			}
		})
	}
}

// TestHelpOfRoot has every command, each in a group.
func TestHelpOfRoot(t *testing.T) {
	root := rootCommand()
	root.InitDefaultHelpCmd()
	text := helpText(root, false, 100)
	for _, c := range root.Commands() {
		if !strings.Contains(text, "\n  "+c.Name()+" ") {
			t.Errorf("%s is not in\n%s", c.Name(), text)
		}
	}
	for name := range groupOf {
		if c, _, err := root.Find([]string{name}); err != nil || c == root {
			t.Errorf("%s has a group and is no command", name)
		}
	}
}

// TestExamples: what is shown to be typed is right usage. Those end to end run each.
func TestExamples(t *testing.T) {
	for _, c := range everyCommand(t) {
		for line := range strings.Lines(c.Example) {
			line = strings.TrimSuffix(line, "\n")
			if strings.HasPrefix(strings.TrimSpace(line), "#") {
				continue
			}
			t.Run(strings.TrimSpace(line), func(t *testing.T) {
				words := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "sudo "))
				if !strings.HasPrefix(line, "  ") || words[0] != "service-proxy-agent" {
					t.Fatalf("want a line \"  [sudo ]service-proxy-agent …\", or a comment: %q", line)
				}
				if c != c.Root() && words[1] != c.Name() {
					t.Errorf("it is not of %s", c.Name())
				}
				if err := parses(words[1:], true); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestPagesAreReadElsewhere: a VM has no docs/, so what help says names pages by their address.
func TestPagesAreReadElsewhere(t *testing.T) {
	page, seen := regexp.MustCompile(`\S*\bdocs/\S*\w`), 0
	for _, c := range everyCommand(t) {
		for _, named := range page.FindAllString(helpText(c, false, 1000), -1) {
			seen++
			name, found := strings.CutPrefix(named, symptom.DocsURL)
			if _, err := os.Stat(filepath.Join("../../docs", name)); !found || err != nil {
				t.Errorf("%s: %s is no page (%v)", c.Name(), named, err)
			}
		}
	}
	if seen < 8 {
		t.Errorf("only %d pages are named", seen)
	}
}
