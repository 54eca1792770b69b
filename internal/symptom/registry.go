package symptom

import (
	"slices"
	"strings"
)

// State is what came of a check.
type State string

const (
	Found   State = "found"
	OK      State = "ok"      // all that it needs was observed, and nothing is wrong
	Unknown State = "unknown" // something that it needs was not observed: see Why
	Ignored State = "ignored" // by who asked, whatever there is
)

// Result is what came of one check: that for a Kind.
type Result struct {
	ID       ID        `json:"id"`
	Row      int       `json:"row,omitempty"`
	Title    string    `json:"title"`
	State    State     `json:"state"`
	Severity Severity  `json:"severity"` // the worst found, else the worst that it can find
	Why      string    `json:"why,omitempty"`
	Findings []Finding `json:"findings,omitempty"` // also of one that is ignored
}

// Examine is Check with an answer for each kind, in the order of Kinds.
func Examine(f Facts, ignore ...ID) []Result {
	found, all := map[ID][]Finding{}, Check(f)
	sinceAgent(f, all)
	for _, one := range all {
		found[one.ID] = append(found[one.ID], one)
	}
	results := make([]Result, 0, len(kinds))
	for _, k := range kinds {
		r := Result{ID: k.ID, Row: k.Row, Title: k.Title, State: OK, Severity: k.Severities[0],
			Findings: found[k.ID]}
		var why []string
		for _, source := range k.Needs {
			if reason, unseen := f.Unseen[source]; unseen {
				why = append(why, string(source)+": "+reason)
			}
		}
		switch {
		case slices.Contains(ignore, k.ID):
			r.State = Ignored
		case len(r.Findings) > 0:
			r.State, r.Severity = Found, r.Findings[0].Severity
		case len(why) > 0:
			r.State, r.Why = Unknown, strings.Join(why, "; ")
		}
		results = append(results, r)
	}
	return results
}
