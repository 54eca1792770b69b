package chaos

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// mayLag is how long the agent's words may be behind what is so.
const mayLag = 5 * time.Second

// truth holds what the agent says against what is seen without it.
type truth struct {
	w *World

	mu    sync.Mutex
	jumps map[Family]jumps // which the kernel had
	at    time.Time        // when they were seen so
	since spells
}

// jumps are which of ours are in: first of their chains.
type jumps struct{ output, inbound, dns bool }

// jumpsOf are those among the rules of nat.
func jumpsOf(rules []string) (j jumps) {
	j.output, _ = jump(rules, "OUTPUT", outputJump)
	j.inbound, _ = jump(rules, "PREROUTING", inboundJump)
	j.dns, _ = jump(rules, "OUTPUT", dnsJump)
	return j
}

// jumpsTold are the jumps that are in where a family's status is true. There may be one alone: a
// family for which Envoy has an inbound listener only has no jump in OUTPUT.
func jumpsTold(f status.Family) (j jumps) {
	if !f.Jumps {
		return j
	}
	shape := status.Shape{Inbound: true, DNS: true} // of an earlier run's rules, which are kept
	if f.Shape != nil {
		shape = *f.Shape
	}
	j.inbound = f.InboundPort != 0 && shape.Inbound
	j.dns = f.DNSPort != 0 && shape.DNS
	j.output = f.OutboundPort != 0 || j.dns // questions by TCP go through the same chain
	return j
}

// lacks says whether there is one that is not among others.
func (j jumps) lacks(others jumps) bool {
	return j.output && !others.output || j.inbound && !others.inbound || j.dns && !others.dns
}

// spells are since when something is wrong without a break, by what it is.
type spells map[string]time.Time

// note says since when; ok is false where it is not wrong.
func (s spells) note(what string, wrong bool, now time.Time) (since time.Time, ok bool) {
	if !wrong {
		delete(s, what)
		return since, false
	}
	if _, known := s[what]; !known {
		s[what] = now
	}
	return s[what], true
}

// sawKernel takes what the kernel had at a time.
func (t *truth) sawKernel(saves map[Family]string, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at = at
	for f, save := range saves {
		t.jumps[f] = jumpsOf(rulesOf(save, "nat"))
	}
}

// forget: another process, or none.
func (t *truth) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.since)
}

// look compares a status, and what /healthz/ready answered after it.
func (t *truth) look(s status.Status, ready int, asked time.Time) (all []Observation) {
	t.mu.Lock()
	defer t.mu.Unlock()
	wrong := func(what string, is bool, more ...any) {
		since, ok := t.since.note(what, is, asked)
		if ok && asked.Sub(since) > mayLag {
			all = append(all, Observation{Kind: Lied, From: since, To: asked, Grace: mayLag, What: what,
				Text: fmt.Sprintf("for %.1f s: mode %s, ready %v (%s), /healthz/ready %d %+v",
					asked.Sub(since).Seconds(), s.Mode, s.Ready, s.NotReady, ready, more)})
		}
	}
	gone, braked, backsOff := t.w.envoyGone(), t.w.braked(), t.w.mayAct(asked)
	wrong("ready without Envoy", gone && ready == http.StatusOK && s.Interception.State != "off")
	wrong("ready and not", (ready == http.StatusOK) != s.Ready)
	if asked.Sub(t.at) > 3*time.Second {
		return all // it is not known what the kernel has
	}
	for _, f := range s.Families {
		family := map[string]Family{"IPv4": IPv4, "IPv6": IPv6}[f.Family]
		have, said := t.jumps[family], jumpsTold(f)
		wrong(f.Family+": jumps that are not there", f.Usable && f.Equal && said.lacks(have), said, have)
		wrong(f.Family+": no jumps, which are there", f.Usable && !f.Jumps && have != jumps{}, have)
		in := f.Usable && have != jumps{} && !backsOff
		wrong(f.Family+": jumps that the brake forbids", in && braked, have)
		wrong(f.Family+": bypass, and jumps without Envoy", in && gone && t.w.Setting.Bypass, have)
	}
	return all
}

// envoyGone says that no Envoy runs: none that we started, and no socket of its user listens on its
// admin port.
func (w *World) envoyGone() bool {
	if w.Envoy.PID() != 0 {
		return false
	}
	gone := true
	_ = w.VM.Do(func() error {
		conn, err := net.DialTimeout("tcp", "127.0.0.1:15000", 200*time.Millisecond)
		if err == nil {
			gone = false
			conn.Close()
		}
		return nil
	})
	return gone
}

// rulesOf are the rules of a table in what iptables-save said, without their counters.
func rulesOf(save, table string) (all []string) {
	in := false
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "*"); ok {
			in = name == table
		}
		if strings.HasPrefix(line, "[") {
			_, line, _ = strings.Cut(line, "] ")
		}
		if in && strings.HasPrefix(line, "-A ") {
			all = append(all, line)
		}
	}
	return all
}

// The jumps, as iptables-save prints them.
const (
	outputJump  = "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"
	inboundJump = "-A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND"
	dnsJump     = "-A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS"
)

// jump says whether a rule is the first of its chain, and how often it is there. Before it there
// may be other jumps of ours.
func jump(rules []string, chain, rule string) (first bool, times int) {
	leading := true
	for _, r := range rules {
		if !strings.HasPrefix(r, "-A "+chain+" ") {
			continue
		}
		if r == rule {
			first = first || leading
			times++
		}
		if !strings.Contains(r, "-j SERVICE_PROXY_") {
			leading = false
		}
	}
	return first, times
}

// expected is what the kernel has to have in one family, told by nothing but the control plane's
// configuration and the setting.
type expected struct {
	jumps    []string // first of their chains, once each
	services []netip.Prefix
	inbound  []netip.AddrPort
	all      bool // one row covers every address, and no service needs one
}

// expect is what is wanted on a calm day.
func expect(s Setting, config controlplane.Config, f Family) (e expected) {
	e.jumps = []string{outputJump, inboundJump}
	if s.DNS {
		e.jumps = append(e.jumps, dnsJump)
	}
	if e.all = s.All; e.all {
		config.Services = nil
	}
	for _, service := range config.Services {
		for _, p := range service.Prefixes {
			if familyOf(p.Addr()) == f {
				e.services = append(e.services, p)
			}
		}
	}
	for _, in := range config.Inbound {
		if familyOf(in.Addr) == f {
			e.inbound = append(e.inbound, netip.AddrPortFrom(in.Addr, in.Port))
		}
	}
	return e
}

// everyRow is the row of intercept-all-outbound.
const everyRow = "-A SERVICE_PROXY_SERVICE_CIDRS -j SERVICE_PROXY_REDIRECT"

var (
	serviceRow = regexp.MustCompile(
		`^-A SERVICE_PROXY_SERVICE_CIDRS -d (\S+) -j SERVICE_PROXY_REDIRECT$`)
	inboundRow = regexp.MustCompile(
		`^-A SERVICE_PROXY_INBOUND -d (\S+) -p tcp -m tcp --dport (\d+) -j SERVICE_PROXY_IN_REDIRECT$`)
)

// differs says how the rules of nat are not as expected, or nil. Rows may be aggregated, so they
// are compared by the addresses that they hold.
func (e expected) differs(rules []string) error {
	var all []error
	for _, j := range e.jumps {
		chain := strings.Fields(j)[1]
		if first, times := jump(rules, chain, j); !first || times != 1 {
			all = append(all, fmt.Errorf("%q is there %d times, first: %v", j, times, first))
		}
	}
	have, want := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	inbound := map[netip.AddrPort]bool{}
	if got := slices.Contains(rules, everyRow); got != e.all {
		all = append(all, fmt.Errorf("a row for every address: %v, want %v", got, e.all))
	}
	for _, r := range rules {
		if m := serviceRow.FindStringSubmatch(r); m != nil {
			p, err := netip.ParsePrefix(m[1])
			all = append(all, err, spread(have, p))
		}
		if m := inboundRow.FindStringSubmatch(r); m != nil {
			p, err := netip.ParsePrefix(m[1])
			all = append(all, err)
			inbound[netip.AddrPortFrom(p.Addr(), uint16(number(m[2])))] = true
		}
	}
	for _, p := range e.services {
		all = append(all, spread(want, p))
	}
	for a := range want {
		if !have[a] {
			all = append(all, fmt.Errorf("no row for %s", a))
		}
	}
	for a := range have {
		if !want[a] {
			all = append(all, fmt.Errorf("a row for %s, which is no service's", a))
		}
	}
	for _, a := range e.inbound {
		if !inbound[a] {
			all = append(all, fmt.Errorf("no row for %s inbound", a))
		}
		delete(inbound, a)
	}
	for a := range inbound {
		all = append(all, fmt.Errorf("a row for %s inbound, which is not served", a))
	}
	return errors.Join(all...)
}

// spread adds the addresses of a prefix.
func spread(to map[netip.Addr]bool, p netip.Prefix) error {
	if p.Addr().BitLen()-p.Bits() > 12 {
		return fmt.Errorf("%s is wider than any service", p)
	}
	for a := p.Masked().Addr(); p.Contains(a); a = a.Next() {
		to[a] = true
	}
	return nil
}

// Config is what the control plane sends now.
func (w *World) Config() controlplane.Config {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.config.apply(w.Setting.Base())
}

// checkStatus says what the status of a calm day should say otherwise, or nil. What may be told
// of a while longer is left out.
func checkStatus(s status.Status, config controlplane.Config,
	longer func(id symptom.ID, finding bool) bool) error {
	if !s.Ready || s.Mode != "intercepting" {
		return fmt.Errorf("status: mode %q, not ready: %s", s.Mode, s.NotReady)
	}
	for _, f := range s.Findings {
		if f.Severity == symptom.Error && !longer(f.ID, true) {
			return fmt.Errorf("status: finding %s: %s", f.ID, f.Cause)
		}
	}
	if s.LastFailure != "" && !strings.Contains(s.LastFailure, "(over; ") &&
		!longer(s.Failing, false) {
		return fmt.Errorf("status: the last failure is not over: %s", s.LastFailure)
	}
	var have, want []string
	for _, one := range s.Services {
		have = append(have, one.Name)
	}
	for _, one := range config.Services {
		want = append(want, one.Name)
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return fmt.Errorf("status: services %v, want %v", have, want)
	}
	if !slices.Equal(s.ServingPorts, []uint16{mesh.AppPort}) {
		return fmt.Errorf("status: serving ports %v, want %d", s.ServingPorts, mesh.AppPort)
	}
	for _, f := range s.Families {
		if !f.Usable || !f.Equal || !f.Jumps {
			return fmt.Errorf("status: %+v", f)
		}
	}
	return nil
}

// checkKernel looks at the rules by itself.
func (w *World) checkKernel(ctx context.Context) error {
	config := w.Config()
	for f, program := range map[Family]string{IPv4: "iptables-save", IPv6: "ip6tables-save"} {
		save, err := w.VM.Run(ctx, program, "-t", "nat")
		if err != nil {
			return err
		}
		if err := expect(w.Setting, config, f).differs(rulesOf(save, "nat")); err != nil {
			return fmt.Errorf("%s: %w", program, err)
		}
	}
	return nil
}

// checkConnections calls every service once, and what is to be reached directly.
func (w *World) checkConnections(ctx context.Context) error {
	all := w.calls(0)
	for i := range 12 {
		for _, p := range Extra(i).Prefixes {
			c := call{from: w.VM, uid: AppUID, to: netip.AddrPortFrom(p.Addr(), Extra(i).Port)}
			c.direct = i >= 10 // those that come and go are gone
			if !c.direct || !w.Setting.All {
				all = append(all, c)
			}
		}
	}
	wrong := make([]error, len(all))
	var pending sync.WaitGroup
	for i, c := range all {
		pending.Go(func() {
			if o := c.observe(ctx); o.Kind != "" {
				wrong[i] = errors.New(o.String())
			}
		})
	}
	pending.Wait()
	if w.Setting.DNS {
		for _, server := range []netip.AddrPort{resolver4, resolver6} {
			o := question{w: w, uid: AppUID, server: server, want: fromEnvoy}.observe(ctx)
			if o.Kind != "" {
				wrong = append(wrong, errors.New(o.String()))
			}
		}
	}
	return errors.Join(wrong...)
}

// tell looks at what the agent's commands and files say once it is calm. It is a lie where they say
// otherwise.
func (w *World) tell(ctx context.Context) {
	lie := func(began time.Time, what, format string, args ...any) {
		w.Observe(Observation{Kind: Lied, From: began, To: time.Now(), What: what,
			Text: "on a calm day: " + fmt.Sprintf(format, args...)})
	}
	began := time.Now()
	for _, path := range []string{"/healthz", "/healthz/ready"} {
		if code, body, err := w.Agent.Get(path); err != nil || code != http.StatusOK {
			lie(began, path, "%d %q %v", code, body, err)
		}
	}
	if _, err := os.Stat(filepath.Join(w.Agent.RunDir(), systemd.ReadyFile)); err != nil {
		lie(began, "ready file", "%v", err)
	}
	for _, command := range []string{"status", "diff", "doctor"} {
		began := time.Now()
		out, stderr, code, err := w.Agent.RunAs(ctx, 0, w.Agent.Settings(), command)
		// It could not look in time: on a machine as busy as this that is the truth, once or twice.
		for tries := 1; err == nil && code == 2 && tries < 3; tries++ {
			out, stderr, code, err = w.Agent.RunAs(ctx, 0, w.Agent.Settings(), command)
		}
		if err == nil && code == 1 && command != "diff" && w.maybeTold(ctx) {
			continue
		}
		if err != nil || code != 0 {
			lie(began, command, "exit code %d, %v:\n%s%s", code, err, out, stderr)
		}
	}
}

// maybeTold says whether all errors that stand are such as may be told for a while after they are
// over. One can have come since the last check.
func (w *World) maybeTold(ctx context.Context) bool {
	s, err := w.Agent.Status(ctx)
	if err != nil {
		return false
	}
	may := w.notYetOver(s, time.Now())
	return !slices.ContainsFunc(s.Findings, func(f symptom.Finding) bool {
		return f.Severity == symptom.Error && !may(f.ID, true)
	})
}
