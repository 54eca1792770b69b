package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/test/docs"
)

// parses says what is wrong with a command line of this program, the words behind its name.
// arguments: they are looked at as well as flags.
func parses(words []string, arguments bool) error {
	root := rootCommand()
	root.InitDefaultHelpCmd()
	found, rest, err := root.Find(words)
	if err != nil {
		return err
	}
	if err := found.ParseFlags(rest); errors.Is(err, pflag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if err := found.ValidateFlagGroups(); err != nil {
		return err
	}
	if !arguments || found.Args == nil {
		return nil
	}
	return found.Args(found, found.Flags().Args())
}

// placeholders are what a reader puts something in for.
var placeholders = strings.NewReplacer("ADDRESS:PORT", "10.0.0.1:80", "COMMAND", "status")

// ours are the command lines of this program within one of a shell: after sudo, behind &&, and in
// one that gcloud has another machine run.
func ours(line string) (all [][]string) {
	words := docs.Words(placeholders.Replace(line))
	for len(words) > 0 {
		end := slices.IndexFunc(words, func(w string) bool { return strings.Trim(w, "|&;") == "" })
		if end < 0 {
			end = len(words)
		}
		one := words[:end]
		if at := slices.Index(one, "service-proxy-agent"); at >= 0 && (at == 0 || one[at-1] != "-u") &&
			!slices.Contains(one[:at], "journalctl") && !slices.Contains(one[:at], "systemctl") {
			all = append(all, one[at+1:])
		}
		for _, word := range one {
			if strings.Contains(word, "service-proxy-agent ") {
				all = append(all, ours(word)...)
			}
		}
		words = words[min(end+1, len(words)):]
	}
	return all
}

// TestDocuments: each command line of ours that a document shows is one that the program takes,
// and so is each that stands in its text, like `doctor --fail-on advice`.
func TestDocuments(t *testing.T) {
	lines, spans := 0, 0
	for _, p := range docs.Pages(t, "../..") {
		for _, c := range p.Commands() {
			for _, words := range ours(c.Text) {
				lines++
				if err := parses(words, true); err != nil {
					t.Errorf("%s:%d: `%s`: %v", c.Page, c.Line, c.Text, err)
				}
			}
		}
		for _, s := range p.Spans() {
			words := docs.Words(placeholders.Replace(strings.TrimPrefix(s.Text, "sudo ")))
			if len(words) > 0 && words[0] == "service-proxy-agent" {
				words = words[1:]
			}
			if len(words) < 2 || !isCommand(words[0]) || strings.Contains(s.Text, "…") {
				continue
			}
			spans++
			err := parses(words, false)
			if err != nil && strings.Contains(err.Error(), "needs an argument") { // its name alone
				err = parses(append(words, "1m"), false)
			}
			if err != nil {
				t.Errorf("%s:%d: `%s`: %v", s.Page, s.Line, s.Text, err)
			}
		}
	}
	if lines < 15 || spans < 20 {
		t.Errorf("only %d command lines and %d spans", lines, spans)
	}
	for line, want := range map[string]int{
		"gcloud compute ssh VM --command 'sudo service-proxy-agent bundle -f -' >b.tgz":           1,
		"service-proxy-agent wait && sudo service-proxy-agent status | grep x":                    2,
		"journalctl -u service-proxy-agent":                                                       0,
		"gcloud compute ssh VM -- -t sudo service-proxy-agent status --serve":                     1,
		"systemctl restart service-proxy-agent; service-proxy-agent status":                       1,
		"tar -xzf service-proxy-agent-1.tgz && service-proxy-agent/service-proxy-agent-bootstrap": 0,
	} {
		if have := ours(line); len(have) != want {
			t.Errorf("%s: %q", line, have)
		}
	}
	for _, line := range []string{"status --no-such-flag", "nonsense", "explain",
		"bootstrap --remove --rollback"} {
		if parses(strings.Fields(line), true) == nil {
			t.Errorf("%s is taken for right", line)
		}
	}
}

func isCommand(name string) bool {
	return slices.ContainsFunc(visible(rootCommand()),
		func(c *cobra.Command) bool { return c.Name() == name })
}
