package symptom

import (
	"slices"
	"time"
)

// told are those of the daemon's own findings that who looks beside it cannot make: what happened
// over time, and what it did not get to see itself.
func told(f Facts) (out []Finding) {
	for _, found := range f.Agent.Findings {
		if f.leftToAgent(found.ID) {
			found.ExplainedBy = "" // explain says anew what is explained by what
			out = append(out, found)
		}
	}
	return out
}

// once leaves out what the daemon told of which the look found the same itself.
func once(all, its []Finding) []Finding {
	type same struct {
		id  ID
		key string
	}
	found := map[same]int{}
	for _, f := range all {
		found[same{f.ID, f.Key}]++
	}
	return slices.DeleteFunc(all, func(f Finding) bool {
		this := same{f.ID, f.Key}
		if found[this] < 2 || !slices.ContainsFunc(its, func(other Finding) bool {
			return other.ID == f.ID && other.Key == f.Key && other.Cause == f.Cause
		}) {
			return false
		}
		found[this]--
		return true
	})
}

// leftToAgent says whether of this kind the daemon's word counts.
func (f Facts) leftToAgent(id ID) bool {
	switch id {
	case AgentStuck: // one that is stuck does not say so
		return false
	case LogUnreadable: // it is another user than who looks
		return true
	case FamilyUnusable:
		// Whether legacy's kernel can have a table shows who makes it, as the daemon does each minute.
		// Who only looks takes one that is not there for empty.
		return true
	}
	at := slices.IndexFunc(kinds, func(k Kind) bool { return k.ID == id })
	return at >= 0 && slices.ContainsFunc(kinds[at].Needs, func(s Source) bool {
		_, unseen := f.Unseen[s]
		return unseen || s == FromAgent
	})
}

// sinceAgent fills in since when the daemon knows what was found, too.
func sinceAgent(f Facts, found []Finding) {
	for i := range found {
		for _, its := range f.Agent.Findings {
			if found[i].Since.IsZero() && its.ID == found[i].ID && its.Key == found[i].Key {
				found[i].Since = its.Since
			}
		}
	}
}

// agentSilent: it takes a connection to its socket and does not answer. The kernel does the first
// for a process that is stopped or hangs.
func agentSilent(f Facts) []Finding {
	if f.Agent.Silent == "" {
		return nil
	}
	return []Finding{finding(AgentStuck, 28, Error,
		"nobody repairs the rules until it is restarted, which leaves them in place; systemd's watchdog "+
			"does that",
		"The agent is stuck: its socket takes connections, and nobody answers there").
		under("silent").seen(FromAgent, time.Time{}, f.Agent.Silent).
		try("systemctl status service-proxy-agent", "sudo journalctl -u service-proxy-agent -n 100",
			restartAgent)}
}
