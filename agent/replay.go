package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/recording"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// ErrRecording says that something is no recording of a look, or one of a form that this program
// does not know.
var ErrRecording = errors.New("not a recorded look")

// mostReplayed bounds what is read: a little more than is ever written.
const mostReplayed = mostRecorded + mostRecorded/10

// Replay reads what Record wrote. It asks nobody anything: the Facts of what it returns are those
// of the look, and its Explain answers by the recording alone. Whoever wrote that is not believed
// more than a listener's name is: it is data, which is printed in bounds.
func Replay(data []byte) (Looked, error) {
	if len(data) > mostReplayed {
		return Looked{}, fmt.Errorf("%w: it is larger than one is", ErrRecording)
	}
	var head struct {
		Schema string `json:"schema"`
	}
	if err := recording.Unmarshal(data, &head); err != nil {
		return Looked{}, fmt.Errorf("%w: %w", ErrRecording, err)
	}
	if head.Schema != lookSchema {
		return Looked{}, fmt.Errorf("%w that this program knows: its schema is %q, not %q; "+
			"take a newer service-proxy-agent", ErrRecording, symptom.Printable(head.Schema, 64), lookSchema)
	}
	var r recorded
	if err := recording.Unmarshal(data, &r); err != nil {
		return Looked{}, fmt.Errorf("%w: %w", ErrRecording, err)
	}
	for i, f := range families {
		if err := r.Families[i].read(f); err != nil {
			return Looked{}, fmt.Errorf("%w: %w", ErrRecording, err)
		}
	}
	return r.looked(), nil
}

// read reads the rules. A table without any has a line, too: none at all was not recorded.
func (r *recordedFamily) read(f iptables.Family) (err error) {
	if len(r.Rules) == 0 && r.RulesErr == nil {
		r.RulesErr = errNotRecorded
	}
	r.table, r.counters, err = iptables.ParseCounted(f, []byte(strings.Join(r.Rules, "\n")))
	if err != nil {
		return err
	}
	want, err := iptables.Parse(f, []byte(strings.Join(r.Want, "\n")))
	r.want = want.Ours()
	return err
}

// looked makes a look of the recording.
func (r *recorded) looked() Looked {
	l := Looked{Known: r.Known, Backend: symptom.Printable(r.Backend, 64), Facts: r.Facts, recorded: r}
	l.Seen = Observation{Now: r.Time,
		Settings: Settings{Version: symptom.Printable(r.Version, 64),
			Commit: symptom.Printable(r.Commit, 64), ProxyUser: r.Facts.ProxyUser,
			EnvoyAdmin: r.Facts.Envoy.Admin},
		Local: []netip.Addr{}, // what is wanted of them is in the recording
		User:  proxyUser{UID: r.User.UID, GID: r.User.GID, Err: r.Facts.UserErr},
		Self:  Self{VM: r.Facts.VM},
	}
	l.Seen.Envoy = envoywatch.View{Outage: envoywatch.Outage{Err: r.Envoy.Err},
		Configured: r.Envoy.Configured}
	l.Seen.Envoy.Snapshot.Listeners = r.Envoy.Listeners
	l.Want.Refused = r.Refused
	for i, f := range r.Families {
		l.Have[i], l.HaveErr[i] = f.table, f.RulesErr
		l.Want.Families[i], l.Want.Served[i] = f.Asked, f.Served
	}
	if r.Daemon != nil {
		l.Daemon = &status.Status{Mode: r.Daemon.Mode, NotReady: r.Daemon.NotReady}
	}
	if !slices.Contains(r.Fields, fieldProbed) { // it was said as if it always were
		l.Facts.Envoy.Probed = true
	}
	l.Facts.Unseen = map[symptom.Source]string{}
	for source, why := range r.Facts.Unseen {
		l.Facts.Unseen[symptom.Source(symptom.Printable(string(source), 64))] = why
	}
	l.Facts.Undecided = r.undecided(factsFields())
	return l
}

// addedFields are the fields of Facts that have come since the first recording of this schema, and
// the kinds of findings that are made of them. A recording that lacks one cannot decide those.
// testdata/look-v1.fields has the first fields.
var addedFields = map[string][]symptom.ID{
	"EnvoyLog":       nil, // of next steps and commands alone
	"Envoy.Handover": nil, // there was no hot restart before it
	fieldProbed:      nil, // of words alone
	"Envoy.Trying":   nil, // of what is not said yet

	"Families.Left.NoModules": nil, // of a next step and commands alone

	"Dropped.Interface": {symptom.InputDropped},

	"ClosedAgent": closedAgentKinds, "ClosedAgent.Unit": closedAgentKinds,
	"ClosedAgent.Starts": closedAgentKinds, "ClosedAgent.Binary": closedAgentKinds,
	"ClosedAgent.Process": closedAgentKinds, "ClosedAgent.Writes": closedAgentKinds,

	"Discarded": discardedKinds, "Discarded.Instance": discardedKinds,
	"Discarded.This": discardedKinds, "Discarded.What": discardedKinds, "Discarded.At": discardedKinds,

	"Brake": offKinds, "Brake.Off": offKinds, "Brake.Since": offKinds, "Brake.By": offKinds,
	"Brake.WhenEnvoyDown": nil, // no finding is made of it
	"Brake.Bad":           keyKinds, "Brake.BadBy": keyKinds,
}

// fieldProbed is whether our own way to the control plane was tried.
const fieldProbed = "Envoy.Probed"

var (
	closedAgentKinds = []symptom.ID{symptom.ClosedAgentHere}
	discardedKinds   = []symptom.ID{symptom.OtherVMsState}
	offKinds         = []symptom.ID{symptom.InterceptionOff}
	keyKinds         = []symptom.ID{symptom.InterceptionKey}
)

// undecided are the kinds that the look did not decide, and those that an older agent did not know,
// or not by the fields of today.
func (r *recorded) undecided(fields []string) map[symptom.ID]string {
	undecided := map[symptom.ID]string{}
	maps.Copy(undecided, r.Facts.Undecided)
	why := fmt.Sprintf("the recording is of an agent (version %s) that is older than this check",
		symptom.Printable(r.Version, 64))
	for _, kind := range symptom.Kinds() {
		if !slices.Contains(r.Kinds, kind.ID) {
			undecided[kind.ID] = why
		}
	}
	for _, field := range fields {
		if slices.Contains(r.Fields, field) {
			continue
		}
		kinds, added := addedFields[field]
		if !added { // no agent has written this
			kinds = nil
			for _, kind := range symptom.Kinds() {
				kinds = append(kinds, kind.ID)
			}
		}
		for _, id := range kinds {
			undecided[id] = why
		}
	}
	return undecided
}
