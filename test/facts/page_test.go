// Package facts tests docs/design/facts.md: what the code relies on of the kernel, of Envoy, of
// systemd and Compute Engine. It holds the page against the comments that point to it, and types
// the commands that it shows.
package facts

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Page is where the facts stand. Comments point to one as Page#NAME.
const Page = "docs/design/facts.md"

// Fact is a section of the page.
type Fact struct {
	Name string
	Text string // all of it, below its heading
	// Shown are the commands that show it. NotRun: they need a booted machine or a cloud.
	Shown  []Command
	NotRun bool
	Tests  []Test
	// RestsOnIt says that what rests on the fact is no comment: the text links to it.
	RestsOnIt bool
}

// Command is what is typed, perhaps of several lines, and what comes of it.
type Command struct {
	Typed    string
	Expected []string
}

// Test is a test that shows a fact.
type Test struct{ Name, Dir string }

var (
	shownBy = regexp.MustCompile(`(?s)Shown by (.*?)(?:\n\n|$)`)
	testOf  = regexp.MustCompile("`((?:Test|Benchmark)[A-Za-z0-9_]+)`" +
		"(?: and `(Test[A-Za-z0-9_]+)`)?\\s+of\\s+`([^`]+)`")
	restsOnIt = regexp.MustCompile(`(?s)Rests on it:.{0,80}?\]\(`)
	// A place in a page of docs/design, named by code, or linked to by another of these pages.
	anywhere = regexp.MustCompile(`(docs/design/|\]\()([a-z]+\.md)(#?)([A-Za-z0-9_-]*)`)
	// What is called a fact or a contract, but not where it stands.
	nowhere = regexp.MustCompile(`(?m)(?:^|\s)\(facts?\)|\bfacts/[a-z]+\.md|\bcontracts? \d|` +
		`\bdesign,? §|\bdesign section \d|\bdocs/design(?:/\w+\.md)?, `)
)

// Parse reads the page.
func Parse(page string) []Fact {
	var all []Fact
	for _, section := range strings.Split("\n"+page, "\n### ")[1:] {
		section, _, _ = strings.Cut(section, "\n## ")
		name, text, _ := strings.Cut(section, "\n")
		f := Fact{Name: name, Text: text, RestsOnIt: restsOnIt.MatchString(text)}
		for i, part := range strings.Split(text, "\n```") {
			if kind, block, _ := strings.Cut(part, "\n"); i%2 == 1 && strings.HasPrefix(kind, "console") {
				f.Shown = append(f.Shown, commands(block)...)
				f.NotRun = f.NotRun || kind != "console"
			}
		}
		for _, said := range shownBy.FindAllString(text, -1) {
			for _, m := range testOf.FindAllStringSubmatch(said, -1) {
				for _, test := range m[1:3] {
					if test != "" {
						f.Tests = append(f.Tests, Test{test, m[3]})
					}
				}
			}
		}
		all = append(all, f)
	}
	return all
}

func commands(block string) []Command {
	var all []Command
	for line := range strings.Lines(block) {
		line = strings.TrimRight(line, "\n")
		last := len(all) - 1
		switch more, isMore := strings.CutPrefix(line, "> "); {
		case strings.HasPrefix(line, "# ") && !strings.HasPrefix(line, "# Warning: ") &&
			!strings.HasPrefix(line, "# Table ") && !strings.HasPrefix(line, "# new generation "):
			all = append(all, Command{Typed: line[2:]})
		case last < 0:
			all = append(all, Command{Typed: "false # an answer without a command: " + line})
		case isMore && len(all[last].Expected) == 0:
			all[last].Typed += "\n" + more
		default:
			all[last].Expected = append(all[last].Expected, line)
		}
	}
	return all
}

// Matches says whether the lines are those that are expected: … stands for anything in a line, and
// for any lines where it is alone.
func (c Command) Matches(lines []string) bool {
	var pattern strings.Builder
	for _, want := range c.Expected {
		if want == "…" {
			pattern.WriteString(`(?:.*\n)*?`)
			continue
		}
		for i, part := range strings.Split(strings.TrimRight(want, " "), "…") {
			if i > 0 {
				pattern.WriteString(`.*`)
			}
			pattern.WriteString(regexp.QuoteMeta(part))
		}
		pattern.WriteString(` *\n`)
	}
	text := ""
	for _, line := range lines {
		text += line + "\n"
	}
	return regexp.MustCompile(`^` + pattern.String() + `$`).MatchString(text)
}

// Problems are what is wrong between the facts and the files of the repository, by their paths.
// Other pages of docs/design link to a fact by facts.md#NAME.
func Problems(all []Fact, files map[string]string) []string {
	var problems []string
	add := func(format string, values ...any) {
		problems = append(problems, fmt.Sprintf(format, values...))
	}
	known, pointed := map[string]bool{}, map[string]bool{}
	for _, f := range all {
		if known[f.Name] {
			add("%s: two facts are called %s", Page, f.Name)
		}
		known[f.Name] = true
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		text := files[file]
		// Regular expressions take their time, and few files have any of it.
		if !slices.ContainsFunc([]string{"fact", "contract", "design"}, func(word string) bool {
			return strings.Contains(text, word)
		}) {
			continue
		}
		if found := nowhere.FindString(text); found != "" {
			add("%s: %q leads nowhere: name a fact as %s#NAME", file, found, Page)
		}
		for _, m := range anywhere.FindAllStringSubmatch(text, -1) {
			page, whole, name := path.Join(path.Dir(Page), m[2]), m[3] == "", m[4]
			isDocument := path.Ext(file) == ".md"
			switch {
			case m[1] == "](" && path.Dir(file) != path.Dir(Page):
			case whole && isDocument: // a document may name a page as a whole
			case whole:
				add("%s: %q: which part of it?", file, m[0])
			case page == Page && known[name]:
				pointed[name] = pointed[name] || !isDocument
			case page == Page || !hasHeading(files[page], name):
				add("%s: there is no %q", file, m[0])
			}
		}
	}
	for _, f := range all {
		if !pointed[f.Name] && !f.RestsOnIt {
			add("%s: nobody points to %s: point to it where the code relies on it, say in it "+
				"“Rests on it: PAGE”, or delete it", Page, f.Name)
		}
		if len(f.Shown) == 0 && len(f.Tests) == 0 {
			add("%s: %s has no command and no test that shows it", Page, f.Name)
		}
		for _, test := range f.Tests {
			if !hasTest(files, test) {
				add("%s: %s: there is no %s in %s", Page, f.Name, test.Name, test.Dir)
			}
		}
	}
	return problems
}

// hasHeading says whether a page has a heading with this anchor. Those that code points to are of
// plain words.
func hasHeading(page, anchor string) bool {
	for line := range strings.Lines(page) {
		heading, ok := strings.CutPrefix(strings.TrimLeft(strings.TrimSpace(line), "#"), " ")
		if ok && strings.HasPrefix(line, "#") && anchor == strings.ReplaceAll(
			strings.ReplaceAll(strings.ToLower(heading), ",", ""), " ", "-") {
			return true
		}
	}
	return false
}

func hasTest(files map[string]string, test Test) bool {
	for file, text := range files {
		if path.Dir(file) == test.Dir && strings.HasSuffix(file, "_test.go") &&
			strings.Contains(text, "\nfunc "+test.Name+"(") {
			return true
		}
	}
	return false
}
