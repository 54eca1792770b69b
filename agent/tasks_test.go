package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/cloudlog"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// anAgent is a daemon over tables in memory, of which nothing runs yet.
func anAgent(t *testing.T) *Agent {
	t.Helper()
	machine := &iptablestest.Machine{Backend: iptables.NFT}
	k, err := iptables.Open(t.Context(), iptables.Options{Machine: machine})
	if err != nil {
		t.Fatal(err)
	}
	envoy, err := envoyadmin.New("127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("RUNTIME_DIRECTORY", t.TempDir())
	a := &Agent{
		settings: Settings{ProxyUser: "1", StateDir: t.TempDir(), WhenEnvoyDown: reconcile.Keep},
		log:      zap.NewNop(), started: testStart, kernel: k, envoy: envoy,
		guest:      guestattr.New(guestattr.Options{}),
		serial:     report.NewSerial(""),
		cloud:      cloudlog.New(cloudlog.Options{}),
		attributes: mailbox.New[attributeNews](), brakes: mailbox.New[brake](),
		others: mailbox.New[[]iptables.OtherChain](), reports: mailbox.New[status.Status](),
		kept: newKept(), pause: make(chan chan struct{}),
	}
	a.around = newSurroundings(askKernel(k, nil), a.log)
	a.metrics = report.NewMetrics(report.Sources{})
	return a
}

// TestTasks: what runs, by name. Each of these that were missing would be missed only on a VM.
func TestTasks(t *testing.T) {
	const always = "loop, watch Envoy, watch the brake, report, keep history, look around, give memory back, " +
		"guest attributes, serial port, Cloud Logging, watch the cost, look for another agent, socket"
	const metadata = "watch the attribute, read the service account, read who the VM is, " +
		"watch the clock, find out whose the state is"
	for _, test := range []struct {
		name   string
		change func(*Agent)
		want   string
	}{
		{"usual", func(*Agent) {},
			", watch other nat chains, " + metadata},
		{"--config", func(a *Agent) { a.config = new(attribute.Default()) }, ", watch other nat chains"},
		{"without iptables", func(a *Agent) { a.withoutTools = true },
			", wait for iptables, " + metadata},
		{"--listen", func(a *Agent) {
			public, err := server.NewPublic("127.0.0.1:0", a.healthz, a.readyz, a.metrics.Handler(), a.log)
			if err != nil {
				t.Fatal(err)
			}
			a.public = public
		}, ", watch other nat chains, listen, " + metadata},
	} {
		a := anAgent(t)
		test.change(a)
		ctx, cancel := context.WithCancel(t.Context())
		var names []string
		for _, task := range a.tasks(ctx, nil) {
			names = append(names, task.name)
		}
		cancel()
		if got := strings.Join(names, ", "); got != always+test.want {
			t.Errorf("%s: %s; want %s", test.name, got, always+test.want)
		}
	}
}

// TestTaskThatFails: its error names it and ends the others.
func TestTaskThatFails(t *testing.T) {
	lost := errors.New("lost")
	err := runTasks(t.Context(), []task{
		{"waits", func(ctx context.Context) error { <-ctx.Done(); return nil }},
		{"fails", func(context.Context) error { return lost }},
	})
	if !errors.Is(err, lost) || err.Error() != "fails: lost" {
		t.Errorf("%v", err)
	}
	if err := runTasks(t.Context(), []task{{"ends", func(context.Context) error {
		return nil
	}}}); err != nil {
		t.Error(err)
	}
}

// TestNewLoop: what the loop begins with.
func TestNewLoop(t *testing.T) {
	a := anAgent(t)
	l := a.newLoop(t.Context(), nil)
	if l.attribute.Known || l.attribute.Config.ProxyPort != attribute.OutboundPort ||
		len(l.families) != 2 || l.user.Err != nil || l.user.UID != 1 || l.mark.set ||
		!l.brake.Awaited || l.told.started != testStart {
		t.Errorf("%+v", l)
	}
	c := attribute.Default()
	c.ProxyPort = 15101
	a.config, a.awaitBootstrap = &c, true
	l = a.newLoop(t.Context(), nil)
	if !l.attribute.Known || l.attribute.Config.ProxyPort != 15101 || !l.bootstrap.awaited ||
		l.brake.Awaited {
		t.Errorf("--config: %+v", l.attribute)
	}
	v := a.thisVM()
	if v.backend() != iptables.NFT || v.self(testStart) != (Self{}) ||
		v.guestOff() != !a.guest.State().Enabled || v.listenErr() != nil || v.metricsErr() != nil {
		t.Errorf("backend %q", v.backend())
	}
	r := a.reporters()
	r.status(status.Status{Mode: "hold"})
	r.history(Failures{})
	if s := <-a.reports.Get(); s.Mode != "hold" || a.status.Load().Mode != "hold" {
		t.Errorf("%+v", s)
	}
	if len(a.kept.failures.Get()) != 1 {
		t.Error("no history")
	}
	if err := r.ready(); err != nil {
		t.Error(err)
	}
}

// deadlines is a kernel that notes how long each read may take.
type deadlines struct {
	reconcile.Kernel
	left []time.Duration
}

func (d *deadlines) Read(ctx context.Context, f iptables.Family) (iptables.Table, error) {
	end, _ := ctx.Deadline()
	d.left = append(d.left, time.Until(end))
	return d.Kernel.Read(ctx, f)
}

// TestPassLimit: each family has its half of what a pass may take.
func TestPassLimit(t *testing.T) {
	a := anAgent(t)
	l := a.newLoop(t.Context(), nil)
	d := &deadlines{Kernel: a.kernel}
	for i, family := range families {
		l.families[i] = reconcile.New(family, d, reconcile.Flows{}, a.log)
	}
	if wake := l.pass(t.Context(), testStart); wake != 0 {
		t.Errorf("wake after %v, want at once: it has only looked", wake)
	}
	if len(d.left) != 2 || slices.Max(d.left) > passLimit/2 ||
		slices.Min(d.left) < passLimit/2-time.Second {
		t.Errorf("time left for the reads: %v", d.left)
	}
}

// TestNumbers: what is promised in documents, or was measured: see where each is declared.
func TestNumbers(t *testing.T) {
	for _, n := range []struct {
		name      string
		got, want time.Duration
	}{
		{"tick", tick, time.Second},
		{"passLimit", passLimit, 20 * time.Second},
		{"othersFirst", othersFirst, 20 * time.Second},
		{"othersEvery", othersEvery, 45 * time.Second},
		{"stuck", stuck, 5 * time.Minute},
		{"envoyDead", envoyDead, 5 * time.Minute},
		{"bootstrapEvery", bootstrapEvery, time.Second},
		{"requestEvery", requestEvery, 30 * time.Second},
		{"storyAge", storyAge, time.Hour},
		{"forgetAfter", forgetAfter, time.Hour},
		{"envoyWarm", envoyWarm, 5 * time.Second},
	} {
		if n.got != n.want {
			t.Errorf("%s is %v, want %v", n.name, n.got, n.want)
		}
	}
}
