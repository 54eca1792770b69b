package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

const (
	proxyUID   = 107
	foreignUID = 1000
)

// rig is a family of IPv4 over a table in memory, at a time of its own.
type rig struct {
	t     *testing.T
	f     *Family
	order Order
	now   time.Time
	logs  *observer.ObservedLogs

	// The kernel.
	nat        *iptablestest.NAT
	unwatched  bool          // changes are not told of
	untold     error         // the same, and why
	why        error         // why the family is not usable
	probes     error         // the same, from the next probe on
	fails      error         // what reads and writes come to
	applyFails error         // what writes come to
	takes      time.Duration // what a read takes
	spent      time.Duration // by commands
	refuses    func(iptables.Plan) (iptables.Ruleset, []iptables.RefusedError)
	between    func()   // after a write, before it is read back
	calls      []string // of it, since they were last taken

	// The connection-tracking table.
	flowsFail error
	flows     []string // what was deleted, since it was last taken
}

// anInterception is what most of these tests want.
func anInterception() iptables.Interception {
	return iptables.Interception{
		Family: iptables.IPv4, ProxyUID: proxyUID, ProxyGID: proxyUID, OutboundPort: 15001,
		Services: prefixes("10.1.0.1/32", "10.1.0.2/32"), ServicePorts: []uint16{80},
	}
}

// newRig is a family whose proxy listens where it should, over an empty table on nft.
func newRig(t *testing.T) *rig {
	core, logs := observer.New(zap.InfoLevel)
	r := &rig{
		t: t, logs: logs, now: time.Unix(1e9, 0), nat: iptablestest.New(nil),
		order: Order{
			Want: anInterception(), Serial: 1, Known: true, ProxyUID: proxyUID, UserKnown: true,
			WhenDown: Keep, Marked: true, Notified: true,
		},
	}
	r.f = New(iptables.IPv4, r, Flows{HalfOpen: r.halfOpen, UDP: r.udp, LateUDP: r.lateUDP},
		zap.New(core))
	r.f.paths.beside = func(walk func()) { walk() }
	r.f.clock = func() time.Time { return r.now.Add(r.spent) }
	r.listens(proxyUID)
	return r
}

// listens makes a user the owner of every port that matters. 0: nobody listens.
func (r *rig) listens(uid uint32) {
	r.order.Ports = r.f.Ports(r.order.Want, r.order.Known, r.order.UserKnown,
		Ports{Outbound: 15001, Inbound: 15006})
	look := func(purpose string, port uint16) symptom.Port {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
		return symptom.Port{Family: iptables.IPv4, Purpose: purpose, Addr: addr, Owner: uid,
			Listening: uid != 0}
	}
	p := r.order.Ports
	r.order.Looks = Looks{look("outbound", p.Outbound), look("inbound", p.Inbound),
		look("DNS", p.DNS)}
}

// want is another want.
func (r *rig) want(i iptables.Interception) {
	r.order.Want, r.order.Serial = i, r.order.Serial+1
	r.listens(proxyUID)
}

// pass is one pass after some time.
func (r *rig) pass(after time.Duration) Outcome {
	r.now = r.now.Add(after)
	return r.f.Pass(r.t.Context(), r.now, r.order)
}

// settle makes passes until none asks for the next at once.
func (r *rig) settle() (out Outcome) {
	r.t.Helper()
	for range 5 {
		if out = r.pass(0); out.Wake > 0 {
			return out
		}
	}
	r.t.Fatal("each pass asks for the next at once")
	return out
}

// installed is a rig whose want is in.
func installed(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	if out := r.settle(); !out.Status.Equal || !out.Status.Jumps {
		t.Fatalf("not installed: %+v", out)
	}
	r.called()
	r.deleted()
	r.logs.TakeAll()
	return r
}

// called are the calls of the kernel since it was last asked.
func (r *rig) called() string {
	calls := strings.Join(r.calls, ", ")
	r.calls = nil
	return calls
}

// deleted are the deletions of connection-tracking entries since it was last asked.
func (r *rig) deleted() string {
	flows := strings.Join(r.flows, ", ")
	r.flows = nil
	return flows
}

// logged are the messages since they were last taken.
func (r *rig) logged() (messages []string) {
	for _, e := range r.logs.TakeAll() {
		messages = append(messages, e.Message)
	}
	return messages
}

// lines are the messages with their fields.
func (r *rig) lines() (lines []string) {
	for _, e := range r.logs.TakeAll() {
		lines = append(lines, fmt.Sprint(e.Message, " ", e.ContextMap()))
	}
	return lines
}

// ours is what the table holds of ours.
func (r *rig) ours() iptables.Ruleset {
	table, err := iptables.Parse(iptables.IPv4, []byte(r.nat.Save()))
	if err != nil {
		r.t.Fatal(err)
	}
	return table.Ours()
}

// others does to the table what another program does, and tells of it.
func (r *rig) others(event iptables.Event, lines ...string) {
	r.t.Helper()
	if err := r.nat.Restore("*nat\n"+strings.Join(lines, "\n")+"\nCOMMIT\n", nil); err != nil {
		r.t.Fatal(err)
	}
	r.f.Note(event, r.now)
}

const jump = "-p tcp -j SERVICE_PROXY_OUTPUT"

// byIptables is the kernel's word on what a program named iptables did to OUTPUT.
var byIptables = iptables.Event{
	Family: iptables.IPv4, Chains: []string{"OUTPUT"}, PID: 42, Program: "iptables",
}

func (r *rig) Read(_ context.Context, f iptables.Family) (iptables.Table, error) {
	r.calls = append(r.calls, "read")
	r.spent += r.takes
	if r.fails != nil {
		return iptables.Table{}, r.fails
	}
	return iptables.Parse(f, []byte(r.nat.Save()))
}

// ReadChains reads everything, and says what it was asked for.
func (r *rig) ReadChains(ctx context.Context, have iptables.Table,
	chains []string) (iptables.Table, error) {
	table, err := r.Read(ctx, have.Family())
	r.calls[len(r.calls)-1] = "read " + strings.Join(chains, " ")
	return table, err
}

func (r *rig) Apply(ctx context.Context, p iptables.Plan) (iptables.Result, error) {
	r.calls = append(r.calls, "apply")
	if err := cmp.Or(r.applyFails, r.fails); err != nil {
		return iptables.Result{Took: 5 * time.Second, Waited: 4 * time.Second}, err
	}
	have, err := iptables.Parse(iptables.IPv4, []byte(r.nat.Save()))
	if err != nil {
		return iptables.Result{}, err
	}
	want := r.f.goal.target
	var left []iptables.RefusedError
	if r.refuses != nil {
		if takes, refused := r.refuses(p); len(refused) > 0 {
			want, left = takes, refused
			p = iptables.NewPlan(want, have)
		}
	}
	if !p.Empty() {
		if err := r.nat.Restore(p.String(), nil); err != nil {
			return iptables.Result{}, err
		}
	}
	if r.between != nil {
		r.between()
	}
	if have, err = iptables.Parse(iptables.IPv4, []byte(r.nat.Save())); err != nil {
		return iptables.Result{}, err
	}
	return iptables.Result{Have: have, Ruleset: want, Left: left,
		Drift: iptables.Diff(want, have), Took: 20 * time.Millisecond, Waited: time.Millisecond}, nil
}

func (r *rig) Probe(_ context.Context, f iptables.Family) error {
	r.calls = append(r.calls, fmt.Sprint("probe ", f))
	r.why = r.probes
	return r.why
}

func (r *rig) Families() []iptables.FamilyState {
	return []iptables.FamilyState{
		{Family: iptables.IPv6, Why: iptables.ErrNoTable}, {Family: iptables.IPv4, Why: r.why},
	}
}

func (r *rig) Watched(iptables.Family) (bool, error) {
	return !r.unwatched && r.untold == nil, r.untold
}

func (r *rig) Share(have iptables.Table, _ iptables.Ruleset) iptables.Table { return have }

func (r *rig) halfOpen(ctx context.Context, to []netip.Prefix) (int, error) {
	r.limited(ctx)
	r.flows = append(r.flows, fmt.Sprint("half-open ", to))
	return len(to), r.flowsFail
}

func (r *rig) udp(ctx context.Context, port uint16) (int, error) {
	r.limited(ctx)
	r.flows = append(r.flows, fmt.Sprint("UDP ", port))
	return 1, r.flowsFail
}

func (r *rig) lateUDP(ctx context.Context, port uint16) (int, error) {
	r.limited(ctx)
	r.flows = append(r.flows, fmt.Sprint("late UDP ", port))
	return 1, r.flowsFail
}

// limited sees to it that no walk through a large table holds up the loop.
func (r *rig) limited(ctx context.Context) {
	if at, ok := ctx.Deadline(); !ok || time.Until(at) > conntrackLimit {
		r.t.Error("a walk through conntrack's table has no limit")
	}
}

// has says whether the table holds the rule.
func (r *rig) has(chain, spec string) bool { return slices.Contains(r.nat.Chains()[chain], spec) }
