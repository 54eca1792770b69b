// Package rulediff makes of rulesets and tables what the command `diff` says: an exit code, a text
// for people in iptables-save's words, and JSON for programs. All three are made of one Difference,
// so that they agree.
//
// It is pure. agent.Differ, which looks, is before it in the flow; iptables.Lines is what compares.
// Rules may be anybody's, with any character in a comment: what leaves here moves no terminal.
package rulediff

import (
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Exit codes, the same in every form of output.
const (
	Same     = exitcode.Yes      // nothing of ours is absent, and nothing there is unwanted
	Differs  = exitcode.No       // something is
	NotKnown = exitcode.NotKnown // nothing is known to be, but it could not be looked everywhere
)

// Results, in a word.
const (
	IsSame  = "same"
	IsOther = "differs"
	Unknown = "unknown"
	// Off is a family that cannot have rules, and in which nothing is wanted for that: readiness does
	// not ask for it, either.
	Off = "off"
)

// Schema names the form of a Difference in JSON, docs/diff.schema.json. Fields may be added to it.
const Schema = "service-proxy-agent/diff/v1"

// Difference is what a comparison came to. Its JSON is that of `diff -o json`
// (docs/diff.schema.json): fields are added, never renamed.
type Difference struct {
	Schema  string    `json:"schema"`
	Version string    `json:"version"` // of this agent
	Time    time.Time `json:"time"`    // of the look, UTC
	Exit    int       `json:"exit"`
	Result  string    `json:"result"`
	// Config is the file whose rules are compared with Against; "": the kernel's rules are.
	Config string `json:"config,omitempty"`
	// Against is what the marks are relative to, in words.
	Against  string   `json:"against"`
	Backend  string   `json:"backend,omitempty"` // of iptables: nft or legacy; "" not known
	Services int      `json:"services"`
	Rules    int      `json:"rules"` // of Against
	Notes    []string `json:"notes"` // what else to know: what is held back, who answers
	Counts
	Families []Family `json:"families"`
	// Others are rules and chains elsewhere, that matter or are left over.
	Others []Line `json:"others"`

	needsRoot bool // to look at the rest
}

// Counts are how many lines there are of each mark but context.
type Counts struct {
	Absent   int `json:"absent"`
	Unwanted int `json:"unwanted"`
	Foreign  int `json:"foreign"`
}

// Family is one family's part.
type Family struct {
	Family string `json:"family"` // IPv4, IPv6
	Result string `json:"result"`
	Why    string `json:"why,omitempty"` // it is unknown, or off
	Rules  int    `json:"rules"`
	Counts
	Lines []Line `json:"lines"`
}

// Line is a line of the comparison.
type Line struct {
	Mark string `json:"mark"` // "-", "+", "!", or " " for where the next ones stand
	Text string `json:"text"` // in iptables-save's form
	Note string `json:"note,omitempty"`
}

// Options are what a Difference is made by, beside the families.
type Options struct {
	Version  string
	Time     time.Time
	Config   string
	Against  string
	Backend  string
	Services int
	Notes    []string
	// NeedsRoot: what could not be looked at root could have.
	NeedsRoot bool
}

// Left is a rule that the kernel does not take.
type Left struct{ Rule, Why string }

// Compare is a family's part of want against have. left are the rules that the kernel does not
// take, as far as that is known.
func Compare(want iptables.Ruleset, have iptables.Table, left []Left) Family {
	rules := want.Len()
	if slices.ContainsFunc(left, func(l Left) bool { return l.Rule == iptables.CommentMatch }) {
		want = want.WithoutComments() // packets go the way they should
	}
	f := part(want.Family(), rules, iptables.Lines(want, have))
	refused := map[string]string{}
	chains := map[string]bool{}
	for _, l := range left {
		refused[l.Rule] = l.Why
		if rest, ok := strings.CutPrefix(l.Rule, "-A "); ok {
			chain, _, _ := strings.Cut(rest, " ")
			chains[chain] = true
		}
	}
	for i, l := range f.Lines {
		if l.Mark != string(iptables.Absent) || l.Note != "" {
			continue
		}
		to := l.Text[strings.LastIndexByte(l.Text, ' ')+1:]
		if why, ok := refused[l.Text]; ok {
			f.Lines[i].Note = "the kernel refuses it: " + why
		} else if chains[to] {
			f.Lines[i].Note = "left out, since the kernel refuses a rule of " + to
		}
	}
	return f
}

// Changes is a family's part of what another attribute would change.
func Changes(now, other iptables.Ruleset) Family {
	return part(now.Family(), now.Len(), iptables.Changes(now, other))
}

// NotSeen is the part of a family that could not be compared.
func NotSeen(f iptables.Family, why error) Family {
	return Family{Family: f.String(), Result: Unknown, Why: why.Error(), Lines: []Line{}}
}

// NotUsable is the part of a family that cannot have rules.
func NotUsable(f iptables.Family, why error) Family {
	return Family{Family: f.String(), Result: Off, Why: why.Error(), Lines: []Line{}}
}

func part(f iptables.Family, rules int, lines []iptables.Line) Family {
	p := Family{Family: f.String(), Rules: rules, Result: IsSame, Lines: Lines(lines)}
	p.Counts = count(p.Lines)
	if p.Absent+p.Unwanted > 0 {
		p.Result = IsOther
	}
	return p
}

// Lines are lines as they are told.
func Lines(lines []iptables.Line) []Line {
	told := make([]Line, 0, len(lines))
	for _, l := range lines {
		told = append(told, Line{Mark: string(rune(l.Mark)), Text: l.Text, Note: l.Note})
	}
	return told
}

func count(lines []Line) (c Counts) {
	for _, l := range lines {
		switch l.Mark {
		case string(iptables.Absent):
			c.Absent++
		case string(iptables.Unwanted):
			c.Unwanted++
		case string(iptables.Foreign):
			c.Foreign++
		}
	}
	return c
}

func (c Counts) plus(d Counts) Counts {
	return Counts{c.Absent + d.Absent, c.Unwanted + d.Unwanted, c.Foreign + d.Foreign}
}

// New puts the families' parts and what is elsewhere together.
func New(families []Family, others []iptables.Line, o Options) Difference {
	d := Difference{
		Schema: Schema, Version: o.Version, Time: o.Time.UTC().Truncate(time.Second), Config: o.Config,
		Against: o.Against, Backend: o.Backend, Services: o.Services,
		Notes: append([]string{}, o.Notes...), Families: families, Others: Lines(others),
		Exit: Same, Result: IsSame, needsRoot: o.NeedsRoot,
	}
	d.Counts = count(d.Others)
	if !slices.ContainsFunc(families, func(f Family) bool { return f.Result != Off }) {
		d.Exit, d.Result = NotKnown, Unknown
	}
	for _, f := range families {
		d.Counts, d.Rules = d.plus(f.Counts), d.Rules+f.Rules
		if f.Result == Unknown {
			d.Exit, d.Result = NotKnown, Unknown
		}
	}
	if d.Absent+d.Unwanted > 0 {
		d.Exit, d.Result = Differs, IsOther
	}
	return d
}
