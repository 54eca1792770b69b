package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Looked is one look at this VM without the daemon, by the same code: what Envoy, the kernel, the
// metadata server and files tell, what the kernel should have, and what it has.
type Looked struct {
	Seen Observation
	// Want is what Envoy and the attribute ask for. Known is false where that could not be told.
	Want  Want
	Known bool
	// Have is table nat by family, in the order of Want.Families, as far as HaveErr is nil.
	Have    [2]iptables.Table
	HaveErr [2]error
	Backend string         // of iptables: nft or legacy; "" not known
	Daemon  *status.Status // of the daemon's socket; nil: none answers
	Facts   symptom.Facts
}

// lookLimit bounds a look as a whole. What has not answered by then is unknown.
const lookLimit = 8 * time.Second

// Look looks once. It changes nothing and it never fails: what could not be seen is in
// Facts.Unseen, with the reason.
func Look(ctx context.Context, s Settings) Looked {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	now := time.Now()
	l := Looked{Seen: Observation{Now: now, Settings: s}}
	unseen := map[symptom.Source]string{}
	var mu sync.Mutex
	// see runs one question beside the others. What comes back too late changes nothing.
	var questions []<-chan struct{}
	see := func(source symptom.Source, question func() (take func(), err error)) {
		done := make(chan struct{})
		questions = append(questions, done)
		mu.Lock()
		unseen[source] = "no answer in time"
		mu.Unlock()
		go func() {
			defer close(done)
			take, err := question()
			mu.Lock()
			defer mu.Unlock()
			if ctx.Err() != nil {
				return
			}
			delete(unseen, source)
			if err != nil {
				unseen[source] = err.Error()
			}
			if take != nil {
				take()
			}
		}()
	}
	v := thisVM(s.StateDir)
	l.Seen.User = proxyIDs(s.ProxyUser, v.userIDs)
	if addrs, err := v.addrs(); err == nil {
		l.Seen.Local = addrs
	}
	see(symptom.FromKernel, func() (func(), error) { return l.readKernel(ctx) })
	see(symptom.FromEnvoy, func() (func(), error) {
		view, err := lookAtEnvoy(ctx, s)
		return func() { l.Seen.Envoy = view }, err
	})
	see(symptom.FromMetadata, func() (func(), error) {
		in, err := lookAtAttribute(ctx, s)
		return func() { l.Seen.Attribute = in }, err
	})
	see(symptom.FromState, func() (func(), error) {
		state, err := progress.Read(s.StateDir)
		return func() { l.Seen.Bootstrap = state }, err
	})
	see(symptom.FromAgent, func() (func(), error) {
		answer, err := lookAtDaemon(ctx)
		return func() { l.Daemon = answer }, err
	})
	for _, done := range questions {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
	mu.Lock()
	defer mu.Unlock()
	seen := l // what comes too late would change l
	var w wanted
	seen.Want, seen.Known = w.desired(s, seen.Seen)
	seen.Facts = seen.Seen.Facts(seen.Want, nil)
	seen.Facts.Unseen = unseen
	return seen
}

// readKernel reads table nat of both families.
func (l *Looked) readKernel(ctx context.Context) (take func(), err error) {
	kernel, err := iptables.Open(ctx, iptables.Options{})
	if err != nil {
		return func() { l.HaveErr = [2]error{err, err} }, nextStep(err)
	}
	var have [2]iptables.Table
	var errs [2]error
	for i, family := range families {
		have[i], errs[i] = kernel.Read(ctx, family)
	}
	return func() { l.Have, l.HaveErr, l.Backend = have, errs, kernel.Backend() }, errs[0]
}

// lookAtEnvoy makes a View by one look.
func lookAtEnvoy(ctx context.Context, s Settings) (envoywatch.View, error) {
	client, err := envoyadmin.New(s.EnvoyAdmin)
	if err != nil {
		return envoywatch.View{}, fmt.Errorf("%w: --envoy-admin: %w", ErrSettings, err)
	}
	defer client.Close()
	client.Trust = trust(s.ProxyUser, new(atomic.Bool))
	watch := envoywatch.New(envoywatch.Options{
		Admin: client, LogPath: s.EnvoyLog, Unit: envoywatch.Unit, Probe: envoywatch.Probe,
	})
	watch.Step(ctx)
	select {
	case view := <-watch.Views():
		return view, view.Err
	default:
		return envoywatch.View{}, errors.New("no answer in time")
	}
}

// lookAtAttribute reads the attribute of --config, or the metadata server's.
func lookAtAttribute(ctx context.Context, s Settings) (attributeInForce, error) {
	if s.Config != "" {
		c, err := readConfig(s.Config)
		if err != nil {
			return attributeInForce{Config: attribute.Default()}, err
		}
		return attributeInForce{Known: true, Config: *c, Serial: 1}, nil
	}
	a := metadata.ReadAttribute(ctx)
	if a.Err != nil {
		return attributeInForce{Config: attribute.Default(), Err: a.Err}, nil
	}
	return attributeInForce{Known: true, Config: a.Config, Serial: 1,
		Good: &goodAttribute{Config: a.Config, Text: a.Text, Read: time.Now()}}, nil
}

// lookAtDaemon asks the daemon's socket.
func lookAtDaemon(ctx context.Context) (*status.Status, error) {
	body, err := server.Dial(server.Dir()).Get(ctx, "/status")
	if err != nil {
		return nil, err
	}
	var s status.Status
	if err := json.Unmarshal(body, &s); err != nil {
		return nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	return &s, nil
}

// Ruleset is what the kernel should have of one family, in the order of Want.Families. The jumps
// are in unless the daemon holds them back.
func (l Looked) Ruleset(family int) iptables.Ruleset {
	want := l.Want.Families[family]
	want.Jumps = l.Daemon == nil || l.Daemon.Mode == "intercepting" || l.Daemon.Mode == ""
	return want.Ruleset()
}
