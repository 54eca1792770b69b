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
	ID       ID       `json:"id"`
	Row      int      `json:"row,omitempty"`
	Title    string   `json:"title"`
	State    State    `json:"state"`
	Severity Severity `json:"severity"` // the worst found, else the worst that it can find
	Why      string   `json:"why,omitempty"`
	// Because is the finding that keeps an unknown one from being looked for: with Envoy down
	// nobody can ask it. Who mends that one looks again.
	Because  ID        `json:"because,omitempty"`
	Findings []Finding `json:"findings"` // also of one that is ignored
}

// blinds are the findings because of which a source says nothing, the first that is there.
var blinds = map[Source][]ID{
	FromEnvoy:        {ForeignOwner, EnvoyOtherUser, EnvoyDown, AdminUnreadable},
	FromClusters:     {ForeignOwner, EnvoyOtherUser, EnvoyDown, AdminUnreadable},
	FromEnvoyLog:     {LogUnreadable},
	FromKernel:       {ToolsMissing, FamilyUnusable, CouldNotLook},
	FromFilter:       {ToolsMissing},
	FromMetadata:     {MetadataServer},
	FromUsers:        {ProxyUser},
	FromAgent:        {AgentStuck},
	FromControlPlane: {EnvoyDown, AdminUnreadable}, // Envoy says which one it is
}

// Examine is Check with an answer for each kind, in the order of Kinds. What a finding that is
// ignored explains stands for itself.
func Examine(f Facts, ignore ...ID) []Result {
	found, hidden, all := map[ID][]Finding{}, map[ID]string{}, Check(f)
	sinceAgent(f, all)
	for _, one := range all {
		if slices.Contains(ignore, one.ExplainedBy) {
			one.ExplainedBy = ""
		}
		found[one.ID] = append(found[one.ID], one)
	}
	for _, one := range Hidden(f) {
		hidden[one.ID] = "bootstrap is under way: " + one.Cause
	}
	results := make([]Result, 0, len(kinds))
	for _, k := range kinds {
		r := Result{ID: k.ID, Row: k.Row, Title: k.Title, State: OK, Severity: k.Severities[0],
			Findings: found[k.ID]}
		why, because := f.unseen(k, found)
		switch {
		case slices.Contains(ignore, k.ID):
			r.State = Ignored
		case len(r.Findings) > 0:
			r.State, r.Severity = Found, r.Findings[0].Severity
		case hidden[k.ID] != "":
			r.State, r.Why = Unknown, hidden[k.ID]
		case f.Undecided[k.ID] != "":
			r.State, r.Why = Unknown, f.Undecided[k.ID]
		case why != "":
			r.State, r.Why, r.Because = Unknown, why, because
		}
		results = append(results, r)
	}
	return results
}

// unseen says which of the sources that a check needs told nothing, and why; because is the finding
// that is the reason for all of them.
func (f Facts) unseen(k Kind, found map[ID][]Finding) (why string, because ID) {
	var all []string
	known := true
	for _, source := range k.Needs {
		reason, unseen := f.Unseen[source]
		if !unseen {
			continue
		}
		all = append(all, say("%s: %s", string(source), reason))
		at := slices.IndexFunc(blinds[source], func(id ID) bool { return len(found[id]) > 0 })
		switch {
		case at < 0:
			known = false
		case because == "":
			because = blinds[source][at]
		}
	}
	if !known {
		because = ""
	}
	return strings.Join(all, "; "), because
}
