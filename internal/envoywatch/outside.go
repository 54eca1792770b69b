package envoywatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// What is asked of others than Envoy: the control plane, systemd, Envoy's log.

// probed is what came of a probe, and of the question for the control planes.
type probed struct {
	process uint64 // whose control planes these are
	started *envoyadmin.Bootstrap
	tried   bool // one of them
	err     error

	began, ended time.Time // of the question to Envoy, if there was one
	asked        error     // what that came to
}

// broken says whether our own way to the control plane is of interest: Envoy's stream is broken, or
// it never got a configuration.
func (w *Watch) broken() bool {
	p := &w.process
	return w.outage.Err == nil && p.id != 0 && (p.stream.end != nil || p.stream.apart() || !p.told)
}

// probe tries our own way to the control plane while Envoy's is broken: Envoy gives the same empty
// reason, or none, for a failed look-up, a closed and a filtered port. It runs beside, and its
// answer is a value. See docs/design/facts.md#envoy-does-not-say-why.
func (w *Watch) probe(ctx context.Context) {
	if !w.broken() {
		w.process.probe, w.process.probed = nil, false
		return
	}
	now := w.o.Now()
	if w.o.Probe == nil || now.Sub(w.probeAt) < probeEvery {
		return
	}
	w.probeAt = now
	try := probed{process: w.process.id, started: w.process.aside.Started}
	go func() {
		select {
		case w.probes <- w.probeControlPlane(ctx, try):
		case <-ctx.Done():
		}
	}()
}

// probeControlPlane tries the control planes that Envoy's bootstrap names, which is asked for once:
// it costs Envoy a third of a second at 10,000 services. It runs beside the Watch and touches of it
// only what never changes.
func (w *Watch) probeControlPlane(ctx context.Context, p probed) probed {
	if p.started == nil {
		p.began = w.o.Now()
		b, err := w.o.Admin.Bootstrap(ctx)
		p.ended, p.asked = w.o.Now(), err
		if err != nil {
			return p // the watch itself tells what is wrong with the admin interface
		}
		p.started = b
	}
	for _, t := range p.started.Targets {
		p.tried = true
		if p.err = w.o.Probe(ctx, t); p.err != nil {
			break
		}
	}
	return p
}

// takeProbe takes the answer of a probe.
func (w *Watch) takeProbe(p probed) {
	w.heard = true
	if !p.ended.IsZero() {
		w.detector.Took(envoyadmin.BootstrapQuestion, p.began, p.ended, p.asked)
	}
	if p.process != w.process.id { // of the Envoy before: this one's way is tried anew
		w.probeAt = time.Time{}
		return
	}
	w.process.probe, w.process.probed = p.err, p.tried
	w.process.aside.Started = cmp.Or(p.started, w.process.aside.Started)
	w.put()
}

// Probe tries our own way to a control plane: look-up, connection and TLS handshake.
func Probe(ctx context.Context, t envoyadmin.Target) error {
	return envoyadmin.Probe(ctx, t.Address, envoyadmin.ProbeOptions{
		TLS: t.TLS, ServerName: t.ServerName, RootCAFile: t.RootCAFile,
	})
}

// askUnit asks systemd what became of Envoy.
func (w *Watch) askUnit(ctx context.Context) {
	if w.o.Unit == nil || !errors.Is(w.outage.Err, envoyadmin.ErrRefused) {
		return
	}
	if w.o.Now().Sub(w.unitAt) < unitEvery {
		return
	}
	w.unitAt = w.o.Now()
	w.outage.LastError = w.lastError()
	var unit string
	w.ask(func() { unit = w.o.Unit(ctx) })
	if unit != "" {
		w.outage.Unit = unit
	}
}

// askForeign asks whether another user's socket on the admin address is an Envoy's.
func (w *Watch) askForeign(ctx context.Context) {
	err := w.outage.Err
	if w.o.Foreign == nil || !errors.Is(err, envoyadmin.ErrUntrusted) ||
		w.o.Now().Sub(w.unitAt) < unitEvery {
		return
	}
	w.unitAt = w.o.Now()
	w.ask(func() { w.outage.ForeignEnvoy = w.o.Foreign(ctx, err) })
}

// Unit is what systemd says of Envoy's unit: "activating, auto-restart, exit code 1, 12 restarts".
// symptom.NoUnit: it has none for it. Without systemd there is nothing to say.
func Unit(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	unit, err := systemd.UnitState(ctx, systemd.EnvoyUnit)
	switch {
	case errors.Is(err, systemd.ErrNoUnit):
		return symptom.NoUnit
	case err != nil:
		return ""
	}
	return unitWords(unit)
}

func unitWords(unit systemd.State) string {
	words := []string{unit.Active}
	if unit.Sub != "" && unit.Sub != unit.Active {
		words = append(words, unit.Sub)
	}
	if unit.ExitCode > 0 {
		words = append(words, fmt.Sprintf("exit code %d", unit.ExitCode))
	}
	if unit.ExitSignal > 0 {
		words = append(words, "ended by "+unix.SignalName(syscall.Signal(unit.ExitSignal)))
	}
	if unit.Restarts > 0 {
		words = append(words, fmt.Sprintf("%d restarts", unit.Restarts))
	}
	return strings.Join(words, ", ")
}

// lastError is the last error line of Envoy's log, as short as a guest attribute needs it.
func (w *Watch) lastError() string {
	if w.o.LogPath == "" {
		return ""
	}
	line, err := envoyadmin.LastError(w.o.LogPath)
	if err != nil {
		return "" // an unreadable log is no reason of its own
	}
	return guestattr.OneLine(line, 300)
}
