package docs

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// notInLab are the commands that TestHelpExamples cannot run, so that each line of theirs has a
// row.
var notInLab = []string{"run", "bootstrap", "envoy"}

// TestCommands: each command line of a document has a row in commands.txt, or is run in the lab.
func TestCommands(t *testing.T) {
	n := newNames(t)
	rows := Rows(t, root)
	used := make([]bool, len(rows))
	count := 0
	for _, p := range n.pages {
		for _, c := range p.Commands() {
			count++
			at := slices.IndexFunc(rows, func(r Row) bool { return r.Of(c) })
			if at < 0 {
				words := Words(strings.TrimPrefix(c.Text, "sudo "))
				if words[0] != "service-proxy-agent" || len(words) < 2 || slices.Contains(notInLab, words[1]) ||
					slices.ContainsFunc(words, isPart) {
					t.Errorf("%s:%d: `%s` has no row in test/docs/commands.txt", c.Page, c.Line, c.Text)
				}
				continue
			}
			used[at] = true
			switch how := rows[at].How; {
			case how == "here":
				n.isHere(c)
			case how == "cloud" || how == "vm":
			case n.tests[how] == nil:
				t.Errorf("commands.txt: %s: there is no such test", how)
			default:
				n.isRunBy(how, c, strings.HasPrefix(rows[at].Line, p.Name+": "))
			}
		}
	}
	for i, r := range rows {
		if !used[i] {
			t.Errorf("commands.txt: no document has `%s`", r.Line)
		}
	}
	if count < 40 {
		t.Errorf("only %d command lines were found", count)
	}
}

func isPart(word string) bool { return strings.Trim(word, "|&;") == "" }

// isRunBy: the test's package has the words of the line in its constants, or takes it from the
// README. ofPage: it is to take all lines of the page, so it has the page's name.
func (n *names) isRunBy(test string, c Said, ofPage bool) {
	n.Helper()
	text := ""
	for _, folder := range n.tests[test] {
		text += n.source[folder]
	}
	if ofPage && strings.Contains(text, filepath.Base(c.Page)) {
		return
	}
	for _, m := range taken.FindAllStringSubmatch(text, -1) {
		if re, err := regexp.Compile("^" + m[1]); err == nil && re.MatchString(c.Text) {
			return
		}
	}
	for _, word := range Words(c.Text) {
		if word == "sudo" || isPart(word) || strings.Contains(text, word) ||
			strings.Contains(word, "VERSION") || strings.ToUpper(word) == word {
			continue
		}
		n.Errorf("%s:%d: `%s` is to be run by %s, whose package does not have %q", c.Page, c.Line, c.Text,
			test, word)
	}
}

// taken is a pattern by which TestNewUser of test/box takes a line from the README.
var taken = regexp.MustCompile("typed\\(`([^`]+)`")

// isHere looks up what a line of this repository names.
func (n *names) isHere(c Said) {
	n.Helper()
	words := Words(c.Text)
	for i, word := range words {
		switch {
		case strings.HasSuffix(word, ".sh"), strings.HasPrefix(word, "./"), i > 0 && words[i-1] == "cd":
			name := strings.TrimSuffix(strings.TrimPrefix(word, "./"), "/...")
			if !slices.Contains(n.files, name) {
				n.Errorf("%s:%d: `%s`: there is no %s", c.Page, c.Line, c.Text, name)
			}
		case i > 0 && words[i-1] == "-run":
			re, err := regexp.Compile(strings.Split(word, "/")[0])
			found := false
			for test := range n.tests {
				found = found || err == nil && re.MatchString(test)
			}
			if !found {
				n.Errorf("%s:%d: `%s`: no test matches %s (%v)", c.Page, c.Line, c.Text, word, err)
			}
		case testFlag.MatchString(word):
			name := testFlag.FindStringSubmatch(word)[1]
			if !n.flags[name] {
				n.Errorf("%s:%d: `%s`: no test has the flag -%s", c.Page, c.Line, c.Text, name)
			}
		}
	}
}

// testFlag is one of a test's own: those of `go test` have no dot, and update and record are ours.
var testFlag = regexp.MustCompile(`^-([a-z]+\.[a-z]+|update|record)\b`)
