package agent

import (
	"cmp"
	"encoding/json"
	"path/filepath"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Failure is one failure and its history.
type Failure struct {
	ID    symptom.ID `json:"id"`
	Key   string     `json:"key,omitempty"`
	Text  string     `json:"text"`
	First time.Time  `json:"first"`
	// Last is when it was seen to be over; zero while it lasts.
	Last time.Time `json:"last,omitzero"`
	// Times counts how often it came: 1 for one that never went away.
	Times int `json:"times"`
}

func (f Failure) is(found symptom.Finding) bool { return f.ID == found.ID && f.Key == found.Key }

// which says which one it is. There may be as many as Envoy has listeners: they are looked up.
type which struct {
	id  symptom.ID
	key string
}

func (f Failure) which() which { return which{f.ID, f.Key} }

// whichOf are those of all.
func whichOf(all []Failure) map[which]bool {
	in := make(map[which]bool, len(all))
	for _, f := range all {
		in[f.which()] = true
	}
	return in
}

// Failures are those that last, and what remains of the one that ended last.
type Failures struct {
	// oldest first; of those that came in one pass the worst last
	Lasting []Failure `json:"lasting,omitempty"`
	Over    Failure   `json:"over,omitzero"`
	// Warnings are told while no failure lasts.
	Warnings Warnings `json:"warnings,omitzero"`
	// Standing is kept with them for the next start.
	Standing Standing `json:"standing,omitzero"`
	identity.Owner
}

// Standing is how the VM stands, in as many words as are grouped by, and since when, UTC.
type Standing struct {
	State   string     `json:"state"`
	Failing symptom.ID `json:"failing,omitempty"`
	Since   time.Time  `json:"since"`
}

func (s Standing) same(t Standing) bool { return s.State == t.State && s.Failing == t.Failing }

// forgetAfter is how long after its end the same failure counts as the same one come
// again, not as a new one.
const forgetAfter = time.Hour

// next are the failures after a pass with these findings, worst first. One that lasts keeps its
// start. Those that stay last without a finding that tells of them.
func (f Failures) next(findings []symptom.Finding, now time.Time, stays ...Failure) Failures {
	now = now.UTC().Truncate(time.Second)
	next := Failures{Over: f.Over, Warnings: f.Warnings, Standing: f.Standing, Owner: f.Owner}
	var errors []symptom.Finding
	at := map[which][]int{} // of errors that are not old ones
	for _, found := range findings {
		if found.Severity == symptom.Error && found.ExplainedBy == "" {
			is := which{found.ID, found.Key}
			at[is] = append(at[is], len(errors))
			errors = append(errors, found)
		}
	}
	staying, old := whichOf(stays), map[int]bool{}
	for _, was := range f.Lasting {
		is := was.which()
		switch found := at[is]; {
		case len(found) > 0:
			was.Text = errors[found[0]].Text()
			old[found[0]], at[is] = true, found[1:]
		case !staying[is]:
			was.Last = now
			next.Over = was
			continue
		}
		next.Lasting = append(next.Lasting, was)
	}
	for i, found := range slices.Backward(errors) {
		if old[i] {
			continue
		}
		is := Failure{ID: found.ID, Key: found.Key, Text: found.Text(), First: now, Times: 1}
		if f.Over.is(found) && now.Sub(f.Over.Last) < forgetAfter {
			is.First, is.Times = f.Over.First, f.Over.Times+1
		}
		next.Lasting = append(next.Lasting, is)
	}
	return next
}

// date has the findings whose time this run has filled in (seen) tell since when they really are,
// by their history.
func (f Failures) date(findings []symptom.Finding, seen map[which]time.Time) {
	first := make(map[which]time.Time, len(f.Lasting)+len(f.Warnings.Lasting))
	for _, is := range f.Lasting {
		first[is.which()] = is.First
	}
	for _, is := range f.Warnings.Lasting {
		first[is.which()] = is.First
	}
	for i, found := range findings {
		is := which{found.ID, found.Key}
		if at, lasts := first[is]; lasts && found.Since.Equal(seen[is]) && at.Before(found.Since) {
			findings[i].Since = at
		}
	}
}

func (f Failures) equal(g Failures) bool {
	return f.Owner == g.Owner && f.Over == g.Over && f.Standing == g.Standing &&
		slices.Equal(f.Lasting, g.Lasting) && f.Warnings.equal(g.Warnings)
}

// newest is the newest of those that last, the zero Failure when none does. An older one may last
// for days and is known.
func (f Failures) newest() Failure {
	if len(f.Lasting) == 0 {
		return Failure{}
	}
	return f.Lasting[len(f.Lasting)-1]
}

// String is the value of agent-last-failure: the newest of those that last; else what is told of
// the warnings; else the last one.
func (f Failures) String() string {
	if n := len(f.Lasting); n > 0 {
		return f.newest().string("since", n-1)
	}
	return cmp.Or(f.Warnings.string(f.Over), f.Over.String())
}

// String has TEXT first, so that a cut value still tells what happened.
func (f Failure) String() string { return f.string("since", 0) }

// showLate is how long some failures may take to show: Envoy logs what its control plane says at
// each attempt, and these are up to 75 s apart.
const showLate = 90 * time.Second

// fightShows is how long somebody who undoes our rules again and again may stay hidden to a new
// run: what comes more rarely than each few seconds is no fight.
const fightShows = 25 * time.Second

// asked says whether the pass would have found a failure of an earlier run if it were still there:
// what it is found by has been asked in this run, which has lasted for so long. Of one that was not
// looked for nobody can say that it is over.
func (p passed) asked(f Failure, running time.Duration) bool {
	v, attribute := p.seen.Envoy, p.seen.Attribute
	told, answered := v.Err != nil || v.State != "", v.Err == nil && v.State != ""
	switch f.ID {
	case symptom.Bootstrap, symptom.ProxyUser:
		return true
	case symptom.AttributeBad, symptom.MetadataServer:
		fresh := attribute.Good != nil && !attribute.Good.Kept
		byConfig := attribute.Known && attribute.Good == nil
		return attribute.Err != nil || fresh || byConfig ||
			f.ID == symptom.MetadataServer && attribute.Source != nil
	case symptom.EnvoyDown, symptom.AdminUnreadable:
		return told
	case symptom.ForeignOwner, symptom.EnvoyOtherUser: // of the ports that Envoy tells, and its own
		return v.Err != nil || answered && p.known
	case symptom.InterceptionNotReady: // is not told of the ports that the rules in place lead to
		return answered && p.known
	case symptom.ListenerRejected, symptom.AccessLogUnwritable:
		return answered && v.Dumps > 0
	case symptom.ControlPlaneLookUp, symptom.ControlPlaneConnect, symptom.APINotEnabled,
		symptom.PermissionDenied, symptom.ScopeMissing, symptom.ConfigNotFound,
		symptom.ControlPlaneRefused:
		return answered && running >= showLate
	case symptom.FamilyUnusable, symptom.RuleRefused, symptom.CouldNotLook, symptom.Shadowed,
		symptom.Fight:
		return p.paused || slices.ContainsFunc(p.outcomes, func(o reconcile.Outcome) bool {
			s := o.Status
			return s.Family == f.Key && (!s.Usable || s.Equal) &&
				(f.ID != symptom.Fight || running >= fightShows)
		})
	case symptom.ClockWrong:
		return p.seen.ClockTold || running >= showLate
	case symptom.ConntrackFull, symptom.EnvoyIdentity, symptom.EnvoyNotOurs,
		symptom.ToolsMissing, symptom.ClosedAgentHere, symptom.InputDropped,
		symptom.ApplicationSilent, symptom.NoRoute, symptom.EndpointsPanic:
		// What they are found by is asked beside the loop, now and then.
		return running >= showLate
	}
	return answered
}

const failureFile = progress.FailureFile

// loadFailures reads the failures of an earlier run on this VM; a missing or unreadable file loses
// nothing but history.
func loadFailures(dir string, vm identity.VM) Failures {
	f := Failures{}
	b, err := readKept(filepath.Join(dir, failureFile), maxKeptFile)
	if err != nil || json.Unmarshal(b, &f) != nil || !vm.Judge(f.Owner).Believed() {
		f = Failures{}
	}
	return f
}

func (f Failures) save(dir string) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return keepFile(dir, failureFile, b)
}
