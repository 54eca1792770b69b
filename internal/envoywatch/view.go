package envoywatch

import (
	"errors"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// View is what is known of Envoy after one look at it. The agent's loop gets the newest and never
// waits for one: an admin interface that hangs holds up only the goroutine that makes Views.
type View struct {
	Outage        // why the last look told nothing; the rest is then of earlier looks
	State  string // LIVE, PRE_INITIALIZING, …
	Info   envoyadmin.ServerInfo
	// Snapshot is the last one that is news: not that of an Envoy which has just started and got no
	// listeners yet.
	Snapshot   envoyadmin.Snapshot
	Rejected   []envoyadmin.Rejected // of the last look, news or not
	Generation uint64                // counts Snapshots; 0: none yet
	// Told is what first told of the change to Snapshot, a line of the log or a look; where Snapshots
	// in between went untaken, of the first of them. Zero: there was no change since the last View
	// that was taken.
	Told time.Time
	// Configured: Snapshot is of this Envoy process, which had completed a listener update.
	Configured bool
	Stream     *symptom.Stream // how its xDS stream last ended; nil: it stands, as far as is known
	Apart      bool            // Envoy has no stream, whether its log says why or not
	Stands     bool            // it was seen to have one, and nothing was seen against it since
	LogErr     string          // why its log cannot be read; "": it can, or Envoy may not have run
	Way
	Past
	Aside
}

// Way is our own way to the control plane, while Envoy's is broken.
type Way struct {
	Probed bool // it was tried
	Probe  error
}

// Past is what has happened since the start.
type Past struct {
	Bucket envoyadmin.Bucket // what the questions have left of what they may take

	Dumps      int // full dumps asked for
	Rejections int // listener updates that Envoy was seen to have rejected
	Restarts   int // Envoys that took the place of another

	Closed *symptom.Stream // how a stream last ended, whatever came since; nil: none is known of
	Heard  time.Time       // when the control plane last sent listeners, by the log; zero: not known
	// Seen is when Connected was first seen to be as it is; zero: it is not known. After fills it in.
	Seen   time.Time
	Target string // of its control plane, as Envoy last told; After keeps it
}

// Connected says whether Envoy has a stream to its control plane, if that is known.
func (v View) Connected() (connected, known bool) {
	switch {
	case v.Stream != nil || v.Apart:
		return false, true
	case v.Err != nil: // it may be gone since
		return false, false
	}
	return v.Stands, v.Stands
}

// Outage is why the admin interface tells nothing.
type Outage struct {
	Err       error     // nil: it does
	Since     time.Time // since when Err
	Asked     time.Time // when what gave Err was last asked
	LastError string    // last error line of Envoy's log
	Unit      string    // systemd's word on Envoy while it is down
	// ForeignEnvoy: another user holds the admin address, and an Envoy answers there. Nothing that it
	// says counts.
	ForeignEnvoy bool
	// Handover: the next Envoy starts beside the one that serves (hot restart). What the admin address
	// does not tell yet, with an error or without, is no failure.
	Handover bool
}

// Facts are the View as internal/symptom takes it; admin is the address of the admin interface.
func (v View) Facts(admin string) symptom.Envoy {
	return symptom.Envoy{
		Admin: admin, Err: v.Err, Since: v.Since, Unit: v.Unit, LastError: v.LastError,
		State: v.State, Version: v.Info.Version, Node: v.Info.Node.ID, Configured: v.Configured,
		Rejected: v.Rejected, Skipped: v.Snapshot.Skipped,
		Stream: v.Stream, Apart: v.Apart, Probe: v.Probe, Probed: v.Probed,
		LogErr: v.LogErr, Handover: v.Handover,
	}
}

// After is a View with since when its stream stands, or does not, and with where that leads while
// Envoy does not tell. was is the View before.
func (v View) After(was View, now time.Time) View {
	is, known := v.Connected()
	wasConnected, wasKnown := was.Connected()
	switch {
	case !known:
	case wasKnown && is == wasConnected:
		v.Seen = was.Seen
	default:
		v.Seen = now
	}
	v.Target = was.Target
	if v.Closed != nil {
		v.Target = v.Closed.Target
	}
	if v.Started != nil && len(v.Started.Targets) > 0 {
		v.Target = v.Started.Targets[0].Address
	}
	return v
}

// unreadable is why Envoy's log cannot be read. missing: there is none, which is no news before
// Envoy has run.
type unreadable struct {
	why     string
	missing bool
}

// view is what is known now.
func (w *Watch) view() View {
	p := w.process
	v := View{
		Outage: w.outage.Outage, State: p.state, Info: p.info, Configured: p.told,
		Snapshot: w.set.snapshot, Rejected: w.set.rejected, Generation: w.set.generation,
		Stream: p.stream.end, Apart: p.stream.apart(), LogErr: w.unreadable.why,
		Stands: p.stream.stands,
		Past: Past{Bucket: w.detector.Bucket(w.o.Now()),
			Dumps: w.set.dumps, Rejections: w.set.rejections, Restarts: w.set.restarts,
			Closed: p.stream.last, Heard: p.stream.heard},
		Aside: p.aside.Aside,
	}
	if w.unreadable.missing && (p.id == 0 || w.outage.Err != nil) {
		v.LogErr = ""
	}
	v.Handover = w.takesOver(w.o.Now())
	if errors.Is(w.outage.Err, envoyadmin.ErrRefused) {
		v.Aside = Aside{} // nobody is there whose endpoints these are
	}
	if w.broken() {
		v.Probe, v.Probed = p.probe, p.probed
	}
	return v
}
