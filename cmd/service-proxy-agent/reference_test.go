package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
)

// TestReference: the pages, and the parts of pages, that are made of the commands.
func TestReference(t *testing.T) {
	root := rootCommand()
	root.InitDefaultHelpCmd()
	whole(t, "../../docs/exit-codes.md", exitCodePage(t, root))
	part(t, "../../docs/settings.md", settingsTable(root))
	part(t, "../../docs/commands.md", flagTables(root))
}

// whole holds a page against what it should be.
func whole(t *testing.T, file, want string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(file); err != nil || string(have) != want {
		t.Errorf("%s is not what the commands say (%v); run `make generated`", file, err)
	}
}

// The lines between which a page is made.
const (
	madeBegin = "<!-- Made by `make generated` of what the commands say. -->\n"
	madeEnd   = "<!-- End of what is made. -->\n"
)

// part does so for what stands in it between madeBegin and madeEnd.
func part(t *testing.T, file, want string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begun := strings.Cut(string(text), madeBegin)
	_, after, ended := strings.Cut(rest, madeEnd)
	if !begun || !ended {
		t.Fatalf("%s lacks the lines %q and %q", file, madeBegin, madeEnd)
	}
	whole(t, file, before+madeBegin+"\n"+want+"\n"+madeEnd+after)
}

// cell is a text in a row of a table.
func cell(text string) string {
	if text == "" {
		return "–"
	}
	return strings.ReplaceAll(text, "|", `\|`)
}

func exitCodePage(t *testing.T, root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("# Exit codes\n\nEach code means one thing, whichever command ends with it. With " +
		"`-o json` it is the same, and\nstands in the answer as `exit` where there is one.\n\n" +
		"| code | what it means |\n|---|---|\n")
	var codes []string
	for _, m := range exitcode.Meanings {
		codes = append(codes, fmt.Sprint(m.Code))
		fmt.Fprintf(&b, "| %d | %s |\n", m.Code, m.Meaning)
	}
	b.WriteString("\nOf each command, in the words of its `--help`:\n\n| command | " +
		strings.Join(codes, " | ") + " |\n|---|" + strings.Repeat("---|", len(codes)) + "\n")
	for _, c := range root.Commands() {
		if c.Hidden {
			continue
		}
		of := map[string]string{}
		for _, e := range says(c).exits {
			if !slices.Contains(codes, e.code) {
				t.Errorf("%s has exit code %s, which is none of %v", c.Name(), e.code, codes)
			}
			of[e.code] = e.meaning
		}
		row := []string{"`" + c.Name() + "`"}
		for _, code := range codes {
			row = append(row, cell(of[code]))
		}
		b.WriteString("| " + strings.Join(row, " | ") + " |\n")
	}
	b.WriteString(`
- ` + "`status --watch`" + ` ends with the code of its last look. With ` + "`--html`" + `
  an error that the page sees by itself counts, too. With ` + "`--serve`" + ` it is 0 once that is
  ended, and 2 where it could not listen.
- ` + "`doctor --fail-on warning`" + ` (or ` + "`advice`" + `) ends with 1 for less than an error.
- ` + "`envoy`" + ` without ` + "`--reload`" + ` is Envoy's supervisor, and ends as Envoy did: with
  its code, or with 128 and the number of the signal that ended it.
- ` + "`service-proxy-agent-bootstrap.sh`" + `, the archive's script, ends with 1 where the program
  cannot run here, and else as ` + "`bootstrap`" + ` does.

This page is made by ` + "`make generated`" + `.
`)
	return b.String()
}

// flagTable is a table of flags; twins: with the variables of the environment.
func flagTable(flags *pflag.FlagSet, twins bool) string {
	var b strings.Builder
	if twins {
		b.WriteString("| flag | variable | unless set | what it is |\n|---|---|---|---|\n")
	} else {
		b.WriteString("| flag | unless given | what it is |\n|---|---|---|\n")
	}
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		unset := strings.Trim(f.DefValue, "[]")
		if f.Value.Type() == "bool" && unset == "false" {
			unset = ""
		} else if f.Value.Type() == "bool" {
			value = ""
		}
		if unset != "" {
			unset = "`" + unset + "`"
		}
		fmt.Fprintf(&b, "| `%s` | ", strings.TrimSpace(name+" "+value))
		if twins {
			fmt.Fprintf(&b, "`%s` | ", envName(f.Name))
		}
		fmt.Fprintf(&b, "%s | %s |\n", cell(unset), cell(usage))
	})
	return b.String()
}

func settingsTable(root *cobra.Command) string {
	for _, c := range root.Commands() {
		if c.Name() == "run" {
			return flagTable(c.LocalFlags(), true)
		}
	}
	return ""
}

func flagTables(root *cobra.Command) string {
	var all []string
	for _, c := range root.Commands() {
		own, daemons := flagsOf(c)
		if c.Hidden || c.Name() == "run" {
			continue
		}
		text := fmt.Sprintf("### Flags of %s\n\n", c.Name())
		if table := flagTable(own, false); strings.Count(table, "\n") > 2 {
			text += table
		} else {
			text += "None of its own.\n"
		}
		if daemons.HasAvailableFlags() {
			var names []string
			daemons.VisitAll(func(f *pflag.Flag) { names = append(names, "`--"+f.Name+"`") })
			text += "\nAnd of [the settings](settings.md#all-of-them) those that say where to look:\n"
			for few := range slices.Chunk(names, 4) {
				text += strings.Join(few, ", ") + ",\n"
			}
			text = strings.TrimSuffix(text, ",\n") + ".\n"
		}
		all = append(all, text)
	}
	return strings.Join(all, "\n")
}
