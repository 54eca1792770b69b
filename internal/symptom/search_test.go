package symptom

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/test/docs"
)

// hit is a line of the page in which words were found.
type hit struct {
	anchor string // of the section that it is in
	line   string
}

// indexRow is one of the table of all findings, which links to a section.
var indexRow = regexp.MustCompile("^\\| \\[`[a-z-]+`\\]\\(#([a-z-]+)\\)")

// sought is what grep -F finds in docs/symptoms.md, in its order, and the other pages that have it.
func sought(pages []docs.Page, words string) (hits []hit, others []string) {
	for _, p := range pages {
		anchor := ""
		for line := range strings.Lines(p.Text) {
			if id, isHeading := strings.CutPrefix(line, "#"); isHeading {
				anchor = strings.Trim(id, "#`\n ")
			}
			switch row := indexRow.FindStringSubmatch(line); {
			case !strings.Contains(line, words):
			case p.Name == "docs/symptoms.md" && row != nil: // it leads there
				hits = append(hits, hit{row[1], line})
			case p.Name == "docs/symptoms.md":
				hits = append(hits, hit{anchor, line})
			case !slices.Contains(others, p.Name):
				others = append(others, p.Name)
			}
		}
	}
	return hits, others
}

// anyName is a word that is not the same on every VM: it has a digit, or looks like an address, a
// path, a name, a chain of iptables, or a rule.
var anyName = regexp.MustCompile(`[0-9@="/\[\]…]|^-|\.[a-z]|_|^[A-Z]{4,}$|^gce-service-proxy$`)

// shared begins what is told of the control plane, whatever is wrong.
const shared = "Cannot reach the Traffic Director API server: "

// behind is what agent-last-failure puts behind the words of a finding.
var behind = regexp.MustCompile(
	` \((warning; |over; )?since .*| \((over; )?\d{4}-.*|; and \d+ more, see .*`)

// fixed are the words that a person who reads a line of agent-last-failure searches for: the
// longest run of words without a name of this VM, within one part of a sentence, of the cause,
// which stands first; behind what all failures of the control plane begin with.
func fixed(line string) string {
	line = behind.ReplaceAllString(strings.TrimPrefix(line, shared), "")
	line = details.ReplaceAllString(line, " ( ")
	cause, next, _ := strings.Cut(line, "; ")
	if words := longestRun(cause); len(words) >= 12 {
		return words
	}
	return longestRun(next)
}

// details stand in brackets.
var details = regexp.MustCompile(` \([^()]*\)`)

// beforeName are words behind which a name stands, or a number.
var beforeName = []string{"listener", "Listener", "cluster", "uid", "pid", "port", "by", "user"}

func longestRun(line string) (longest string) {
	run, last := "", ""
	for word := range strings.FieldsSeq(line) {
		if word == "(" || anyName.MatchString(strings.Trim(word, ",;:`'")) ||
			slices.Contains(beforeName, last) {
			run, last = "", word
			continue
		}
		run, last = strings.TrimSpace(run+" "+word), word
		if bare := strings.TrimRight(run, ",;:."); len(bare) > len(longest) &&
			!slices.Contains(beforeName, word) {
			longest = bare
		}
		if strings.ContainsAny(word[len(word)-1:], ";:.") {
			run = ""
		}
	}
	return longest
}

// lastFailures are lines as agent-last-failure has them, by kind: what TestSymptoms of test/e2e
// has read from outside of real VMs, and has written into the page; and the words of the examples,
// with other names.
func lastFailures(t *testing.T, page docs.Page) map[ID][]string {
	t.Helper()
	all := map[ID][]string{}
	row := regexp.MustCompile(`^\| \S+ \| \[([a-z-]+)\]\(#[a-z-]+\) \| .* \| [0-9.]+ \| (.*) \|$`)
	_, measured, _ := strings.Cut(page.Text, "\n## What was measured\n")
	for line := range strings.Lines(measured) {
		if m := row.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			all[ID(m[1])] = append(all[ID(m[1])], strings.NewReplacer(`\|`, "|", "&lt;", "<").Replace(m[2]))
		}
	}
	if len(all) < 40 {
		t.Errorf("the page has measured words of %d kinds alone", len(all))
	}
	others := strings.NewReplacer("IPv4", "IPv6", "OUTPUT", "PREROUTING", "listener l", "listener web",
		"Listener l", "Listener web", "envoy.err.log", "other.log")
	for _, e := range examples {
		if e.want != "" {
			all[e.want] = append(all[e.want], others.Replace(Check(e.facts)[0].Text()))
		}
	}
	return all
}

// TestSearch: who has nothing but the built documents and a line of agent-last-failure finds the
// section of what is wrong by one search, for each kind.
func TestSearch(t *testing.T) {
	pages := docs.Pages(t, "../..")
	at := slices.IndexFunc(pages, func(p docs.Page) bool { return p.Name == "docs/symptoms.md" })
	lines := lastFailures(t, pages[at])
	for _, k := range Kinds() {
		if k.ID == Starting {
			continue // status alone says so
		}
		if strings.Count(pages[at].Text, "\n### `"+string(k.ID)+"`\n") != 1 {
			t.Errorf("%s has not one section", k.ID)
		}
		if len(lines[k.ID]) == 0 {
			t.Errorf("no words of %s", k.ID)
		}
		for _, line := range lines[k.ID] {
			words, want := fixed(line), string(k.ID)
			if k.ID == Fight && strings.HasPrefix(line, "Our jump ") { // told first while it is undone
				want = string(Shadowed)
			}
			hits, others := sought(pages, words)
			if len(words) < 12 || len(hits) == 0 || hits[0].anchor != want {
				t.Errorf("%s: %q of %q leads to %v, and to %q", k.ID, words, line, anchorsOf(hits), others)
			}
		}
	}
}

func anchorsOf(hits []hit) (all []string) {
	for _, h := range hits {
		all = append(all, h.anchor)
	}
	return slices.Compact(all)
}

// TestAlsoTold: words of others lead to their section, too, and those of the control plane are
// understood as this kind.
func TestAlsoTold(t *testing.T) {
	pages := docs.Pages(t, "../..")
	closed := regexp.MustCompile(`closed: (\d+), (.+)`)
	understood := 0
	for id, all := range alsoTold {
		kindOf(t, id)
		for _, words := range all {
			if hits, _ := sought(pages, words); len(hits) == 0 || hits[0].anchor != string(id) {
				t.Errorf("%s: %q leads to %v", id, words, anchorsOf(hits))
			}
			m := closed.FindStringSubmatch(words)
			if m == nil || m[1] == "14" { // unavailable: the probe tells why
				continue
			}
			understood++
			code, err := strconv.Atoi(m[1])
			if err != nil {
				t.Fatal(err)
			}
			f := stream(code, strings.ReplaceAll(m[2], "…", "x"))
			if id == ScopeMissing {
				f.Scopes = []string{"https://www.googleapis.com/auth/devstorage.read_only"}
			}
			if found := Check(f); len(found) == 0 || found[0].ID != id {
				t.Errorf("%s: %q is understood as %+v", id, words, found)
			}
		}
	}
	if understood < 6 {
		t.Errorf("only %d ends of a stream", understood)
	}
	for words, anchor := range map[string]string{
		"Cannot reach the Traffic Director API server": "The control plane",
		"configuration was not found for network":      string(ConfigNotFound),
	} {
		if hits, _ := sought(pages, words); len(hits) == 0 || hits[0].anchor != anchor {
			t.Errorf("%q leads to %v", words, anchorsOf(hits))
		}
	}
}
