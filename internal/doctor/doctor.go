// Package doctor makes of the results of the checks what the command `doctor` says: an exit code, a
// text for people, and JSON for programs. All three are made of one Report, so that they agree.
//
// It is pure. It looks at nothing and knows no cause: agent.Look is before it in the flow, and
// symptom.Examine, whose words it prints. Both may quote what others wrote (the names of Envoy's
// listeners, lines of a log), of any length and with any character: what leaves here is bounded,
// and moves no terminal.
package doctor

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Exit codes, the same in every form of output.
const (
	Fine     = exitcode.Yes      // nothing of the severity to fail on, and all its checks could look
	Sick     = exitcode.No       // something was found
	NotKnown = exitcode.NotKnown // nothing was found, but a check of that severity could not look
)

// Schema names the form of a Report in JSON, docs/doctor.schema.json. Fields may be added to it.
const Schema = "service-proxy-agent/doctor/v1"

// Report is what a look came to.
type Report struct {
	Schema  string           `json:"schema"`
	Version string           `json:"version"` // of this agent
	Time    time.Time        `json:"time"`    // of the look, UTC
	Exit    int              `json:"exit"`
	FailOn  symptom.Severity `json:"fail_on"`
	Ignored []symptom.ID     `json:"ignored"`
	// Findings are what was found and is not ignored, worst first, each followed by what it explains.
	Findings []symptom.Finding `json:"findings"`
	Checks   []Check           `json:"checks"`
	// Unseen are the sources that could not be observed, and why.
	Unseen map[symptom.Source]string `json:"unseen,omitempty"`
}

// Check is what came of one check.
type Check struct {
	symptom.Result
	More int `json:"more,omitempty"` // findings that were left out, since there are too many
}

// Options are what a Report is made by.
type Options struct {
	Version string
	Time    time.Time
	FailOn  symptom.Severity
	Ignored []symptom.ID
	Unseen  map[symptom.Source]string
}

// New makes a Report of the results of symptom.Examine.
func New(results []symptom.Result, o Options) Report {
	r := Report{
		Schema: Schema, Version: symptom.Printable(o.Version, 64),
		Time: o.Time.UTC().Truncate(time.Second), FailOn: o.FailOn,
		Ignored: append([]symptom.ID{}, o.Ignored...), Findings: []symptom.Finding{},
		Checks: make([]Check, 0, len(results)), Unseen: map[symptom.Source]string{},
		Exit: exit(results, o.FailOn),
	}
	for source, why := range o.Unseen {
		r.Unseen[source] = symptom.Printable(why, maxText)
	}
	for _, result := range results {
		r.Checks = append(r.Checks, bounded(result))
	}
	for _, one := range r.Tree() {
		one.Walk(func(n *symptom.Tree) { r.Findings = append(r.Findings, n.Finding) })
	}
	return r
}

// exit is the exit code. What another finding explains counts as well: it is of the same look, and
// its cause may be less severe than it is.
func exit(results []symptom.Result, failOn symptom.Severity) int {
	code := Fine
	for _, r := range results {
		switch {
		case r.State == symptom.Found && slices.ContainsFunc(r.Findings,
			func(f symptom.Finding) bool { return f.Severity >= failOn }):
			return Sick
		case r.State == symptom.Unknown && r.Severity >= failOn:
			code = NotKnown
		}
	}
	return code
}

// ParseSeverity reads the value of --fail-on.
func ParseSeverity(word string) (symptom.Severity, error) {
	for _, s := range []symptom.Severity{symptom.Error, symptom.Warning, symptom.Advice} {
		if s.String() == word {
			return s, nil
		}
	}
	return 0, fmt.Errorf("%q is no severity; use error, warning or advice", word)
}

// ParseIDs reads the values of --ignore, each an id or several with commas between them.
func ParseIDs(words []string) ([]symptom.ID, error) {
	var known, ids []symptom.ID
	for _, k := range symptom.Kinds() {
		known = append(known, k.ID)
	}
	for _, list := range words {
		for word := range strings.SplitSeq(list, ",") {
			id := symptom.ID(strings.TrimSpace(word))
			switch {
			case id == "" || slices.Contains(ids, id):
			case !slices.Contains(known, id):
				slices.Sort(known)
				return nil, fmt.Errorf("there is no check %q; these are: %s", symptom.Printable(string(id), 64),
					joined(known))
			default:
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

func joined[T ~string](ids []T) string {
	words := make([]string, len(ids))
	for i, id := range ids {
		words[i] = string(id)
	}
	return strings.Join(words, ", ")
}

// Tree are the findings, each with what it explains.
func (r Report) Tree() []*symptom.Tree {
	var all []symptom.Finding
	for _, check := range r.Checks {
		if check.State == symptom.Found {
			all = append(all, check.Findings...)
		}
	}
	return symptom.Nested(all)
}
