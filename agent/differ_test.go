package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/rulediff"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// silent is an Envoy that does not answer.
var silent = envoywatch.View{Outage: envoywatch.Outage{Err: envoyadmin.ErrRefused}}

// interceptingLook is a VM with an Envoy that has one service, and the rules for it.
func interceptingLook(t *testing.T) Looked {
	t.Helper()
	l := Looked{Backend: iptables.NFT, Daemon: &status.Status{Mode: "intercepting"},
		Shapes: [2]status.Shape{reconcile.Whole(), reconcile.Whole()}}
	l.Seen = Observation{User: proxyUser{UID: 107, GID: 107}, Local: []netip.Addr{},
		Attribute: attributeInForce{Known: true, Config: attribute.Default(), Serial: 1},
		Envoy: envoywatch.View{Generation: 1, Snapshot: envoyadmin.Snapshot{
			Listeners: []envoyadmin.Listener{outboundOf(envoyadmin.FilterChain{
				Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}})}}},
	}
	var w wanted
	l.Want, l.Known = w.desired(l.Seen.Settings, l.Seen)
	for i := range families {
		l.Have[i] = saved(t, l, i, "")
	}
	if !l.Known || l.Ruleset(0).Empty() {
		t.Fatal("nothing is wanted")
	}
	return l
}

// saved is what a save shows of a family's rules without one text of it.
func saved(t *testing.T, l Looked, i int, gone string) iptables.Table {
	t.Helper()
	save := reconcile.Shaped(l.Want.Families[i], reconcile.Whole()).String()
	if !strings.Contains(save, gone) {
		t.Fatalf("no %q in\n%s", gone, save)
	}
	have, err := iptables.Parse(families[i], []byte(strings.ReplaceAll(save, gone, "")))
	if err != nil {
		t.Fatal(err)
	}
	return have
}

func printed(t *testing.T, d rulediff.Difference) string {
	t.Helper()
	var b bytes.Buffer
	if err := d.Text(&b, false, 1000); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestDiffers(t *testing.T) {
	asRoot := "next: run it as root\n" // who is root already cannot be helped by that
	if os.Geteuid() == 0 {
		asRoot = "next: look why with "
	}
	const jump = "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n"
	const row = "-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.1/32 -j SERVICE_PROXY_REDIRECT\n"
	empty, err := iptables.Parse(iptables.IPv4, nil)
	if err != nil {
		t.Fatal(err)
	}
	const held = "the jumps are held back: Envoy does not accept on 15001"
	hold := func(l *Looked) {
		l.Shapes[0] = status.Shape{Held: held}
		l.Daemon.Mode = "hold"
	}
	for _, test := range []struct {
		name      string
		change    func(*Looked)
		elsewhere []iptables.Elsewhere
		err       error
		exit      int
		say       []string // parts of the text
		not       string   // no part of it
	}{
		{"as wanted", func(*Looked) {}, nil, nil, rulediff.Same,
			[]string{"IPv4 and IPv6 rules are as wanted: 1 service, 19 rules, nft\n"}, "agent"},
		{"a row is gone", func(l *Looked) { l.Have[0] = saved(t, *l, 0, row) }, nil, nil,
			rulediff.Differs, []string{"- " + row, "IPv4 rules differ"}, ""},
		{"no daemon", func(l *Looked) { l.Daemon = nil }, nil, nil, rulediff.Same,
			[]string{"no agent answers", "as wanted"}, ""},
		{"the jumps are held back", func(l *Looked) {
			hold(l)
			l.Have[0] = saved(t, *l, 0, jump)
		}, nil, nil, rulediff.Same, []string{"IPv4: " + held + "\n", "as wanted"}, "- "},
		{"and no chain is in", func(l *Looked) { hold(l); l.Have[0] = empty }, nil, nil, rulediff.Same,
			[]string{"IPv4: " + held + "\n", "as wanted"}, "- "},
		{"but a jump is in", hold, nil, nil, rulediff.Differs, []string{"+ " + jump, held}, ""},
		{"paused", func(l *Looked) {
			l.Daemon.Paused, l.Known = true, false
			l.Have = [2]iptables.Table{empty, empty}
		}, nil, nil, rulediff.Same, []string{"paused by cleanup", "0 rules"}, ""},
		{"paused, and rules are in", func(l *Looked) { l.Daemon.Paused = true }, nil, nil,
			rulediff.Differs, []string{"+ " + jump, "+ :SERVICE_PROXY_OUTPUT\n", "paused"}, ""},
		{"a rule that the kernel does not take", func(l *Looked) {
			l.Daemon.Families = []status.Family{{Family: "IPv4",
				Left: []status.Left{{Rule: strings.TrimSpace(row), Why: "No chain/target/match"}}}}
			l.Have[0] = saved(t, *l, 0, row)
		}, nil, nil, rulediff.Differs,
			[]string{"- " + row[:len(row)-1] + "  # the kernel refuses it: No chain/target/match\n"}, ""},
		{"no comments", func(l *Looked) {
			l.Daemon.Families = []status.Family{{Family: "IPv4",
				Left: []status.Left{{Rule: iptables.CommentMatch, Why: "no match"}}}}
			have, err := iptables.Parse(iptables.IPv4, []byte(l.Ruleset(0).WithoutComments().String()))
			if err != nil {
				t.Fatal(err)
			}
			l.Have[0] = have
		}, nil, nil, rulediff.Same, []string{"without their comments"}, "- "},
		{"Envoy does not answer", func(l *Looked) {
			l.Known, l.Seen.Envoy = false, silent
		}, nil, nil, rulediff.NotKnown, []string{"IPv4: could not look: it is not known what is wanted: Envoy: ",
			"next: look why with `sudo service-proxy-agent doctor`"}, "as wanted:"},
		{"no attribute", func(l *Looked) {
			l.Known, l.Seen.Attribute = false, attributeInForce{Err: attribute.ErrMissing}
		}, nil, nil, rulediff.NotKnown, []string{attribute.ErrMissing.Error()}, ""},
		{"one family cannot be read", func(l *Looked) { l.HaveErr[1] = iptables.ErrNotRoot }, nil, nil,
			rulediff.NotKnown, []string{"IPv6: could not look: not permitted", "IPv4 rules are as wanted", asRoot}, ""},
		{"and the other differs", func(l *Looked) {
			l.HaveErr[1], l.Have[0] = iptables.ErrNotRoot, empty
		}, nil, nil, rulediff.Differs, []string{"IPv6: could not look", "IPv4 rules differ"}, ""},
		{"a family without a table", func(l *Looked) {
			l.HaveErr[1] = fmt.Errorf("%w: %w", iptables.ErrUnusable, iptables.ErrNoTable)
		}, nil, nil, rulediff.Same, []string{"IPv6: off: ", "the kernel has no nat table", "IPv4 rules are as wanted"}, ""},
		{"others", func(l *Looked) {
			l.Seen.Others = []iptables.OtherChain{{Backend: "nft", Family: "inet", Table: "t", Chain: "c",
				Hook: iptables.Output, Priority: -110}}
		}, []iptables.Elsewhere{{Family: iptables.IPv4, Backend: iptables.Legacy,
			Others: []iptables.OtherChain{{Backend: "legacy", Family: "ip", Table: "nat",
				Chain: "OUTPUT", Hook: iptables.Output, Priority: -100, Rules: 2}}}}, nil, rulediff.Same,
			[]string{"! nft inet t c hook output priority -110", "! legacy ip nat OUTPUT",
				"2 lines of others matter (!), which is no difference"}, ""},
		{"left in the other backend", func(*Looked) {}, []iptables.Elsewhere{{Family: iptables.IPv4,
			Backend: iptables.Legacy, Chains: []string{"SERVICE_PROXY_OUTPUT"},
			Jumps: []string{strings.TrimSpace(jump)}}}, nil, rulediff.Differs,
			[]string{"+ :SERVICE_PROXY_OUTPUT  # IPv4 in the legacy backend",
				"+ " + strings.TrimSpace(jump)}, ""},
		{"the other backend cannot be seen", func(*Looked) {}, nil, iptables.ErrCouldNotLook,
			rulediff.Same, []string{"the other backend: could not look\n"}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := interceptingLook(t)
			test.change(&l)
			d := l.differs(test.elsewhere, test.err)
			text := printed(t, d)
			if d.Exit != test.exit {
				t.Errorf("exit code %d, want %d", d.Exit, test.exit)
			}
			for _, part := range test.say {
				if !strings.Contains(text, part) {
					t.Errorf("no %q", part)
				}
			}
			if test.not != "" && strings.Contains("\n"+text, "\n"+test.not) {
				t.Errorf("has %q", test.not)
			}
			if t.Failed() {
				t.Log("\n" + text)
			}
		})
	}
}

// TestChangesOfAnAttribute: what another attribute would change is told also without the kernel.
func TestChangesOfAnAttribute(t *testing.T) {
	other := attribute.Default()
	other.ExcludeOutboundIPRanges = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	const comes = "+ -A SERVICE_PROXY_OUTPUT -d 10.9.0.0/16 -m comment --comment excluded -j RETURN\n"
	unread := [2]error{iptables.ErrNotRoot, iptables.ErrNotRoot}
	for _, test := range []struct {
		name   string
		change func(*Looked)
		by     attribute.Config
		exit   int
		say    []string
	}{
		{"an exclude", func(*Looked) {}, other, rulediff.Differs,
			[]string{comes, "0 lines would go (-), 1 line would come (+), against what the attribute asks"}},
		{"without the kernel", func(l *Looked) { l.HaveErr, l.Backend = unread, "" }, other,
			rulediff.Differs, []string{comes}},
		{"while the jumps are held back", func(l *Looked) { l.Shapes = [2]status.Shape{} }, other,
			rulediff.Differs, []string{comes}},
		{"the same", func(*Looked) {}, attribute.Default(), rulediff.Same, []string{"stay as they are"}},
		{"against the kernel", func(l *Looked) {
			l.Known, l.Seen.Attribute = false, attributeInForce{Err: attribute.ErrMissing}
			l.Want = Want{}
		}, other, rulediff.Differs, []string{comes, "against the rules that the kernel has, since"}},
		{"against nothing", func(l *Looked) {
			l.Known, l.Seen.Attribute = false, attributeInForce{Err: attribute.ErrMissing}
			l.HaveErr = unread
		}, other, rulediff.NotKnown, []string{"IPv4: could not look: not permitted"}},
		{"Envoy does not answer", func(l *Looked) {
			l.Known, l.Seen.Envoy = false, silent
		}, other, rulediff.NotKnown, []string{"could not look: Envoy: "}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := interceptingLook(t)
			test.change(&l)
			d := l.changes("new.json", test.by)
			text := printed(t, d)
			if d.Exit != test.exit {
				t.Errorf("exit code %d, want %d\n%s", d.Exit, test.exit, text)
			}
			for _, part := range test.say {
				if !strings.Contains(text, part) {
					t.Errorf("no %q in\n%s", part, text)
				}
			}
		})
	}
}

// TestSteady: a daemon that is about to write what differs gets the time for it, and no more.
func TestSteady(t *testing.T) {
	differs, same := rulediff.Difference{Exit: rulediff.Differs}, rulediff.Difference{}
	unknown := rulediff.Difference{Exit: rulediff.NotKnown}
	for _, test := range []struct {
		name  string
		looks []rulediff.Difference
		again bool // a daemon answers
		n     int
		exit  int
		took  time.Duration
	}{
		{"same", []rulediff.Difference{same}, true, 1, rulediff.Same, 0},
		{"it was being written", []rulediff.Difference{differs, same}, true, 2, rulediff.Same,
			500 * time.Millisecond},
		{"it stays", []rulediff.Difference{differs, differs, differs, differs, same}, true, 4,
			rulediff.Differs, 5 * time.Second},
		{"no daemon", []rulediff.Difference{differs, same}, false, 1, rulediff.Differs, 0},
		{"then nobody could look", []rulediff.Difference{differs, unknown}, true, 2, rulediff.NotKnown,
			500 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			n, began := 0, time.Now()
			d := steady(t.Context(), differAgain, func() (rulediff.Difference, bool) {
				n++
				return test.looks[n-1], test.again
			})
			if took := time.Since(began); n != test.n || d.Exit != test.exit || took != test.took {
				t.Errorf("%s: %d looks, exit code %d after %v", test.name, n, d.Exit, took)
			}
		})
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if d := steady(ended, differAgain, func() (rulediff.Difference, bool) { return differs, true }); d.
		Exit != rulediff.Differs {
		t.Errorf("interrupted: %+v", d)
	}
}

// TestDaemonShape: what the daemon says of its rules counts, and what it cannot say does not.
func TestDaemonShape(t *testing.T) {
	held := status.Shape{Inbound: true, Held: "why"}
	for name, test := range map[string]struct {
		daemon *status.Status
		want   status.Shape
		told   bool
	}{
		"none":         {nil, status.Shape{}, false},
		"another one":  {&status.Status{Families: []status.Family{{Family: "IPv4"}}}, status.Shape{}, false},
		"other family": {&status.Status{Families: []status.Family{{Family: "IPv6", Shape: &held}}}, status.Shape{}, false},
		"told":         {&status.Status{Families: []status.Family{{Family: "IPv4", Shape: &held}}}, held, true},
	} {
		if s, told := (Looked{Daemon: test.daemon}).daemonShape(0); s != test.want || told != test.told {
			t.Errorf("%s: %+v %v", name, s, told)
		}
	}
}

// TestDifferRefusesAFile: a file that is no attribute is a bad setting that names the key.
func TestDifferRefusesAFile(t *testing.T) {
	file := t.TempDir() + "/bad.json"
	text := []byte(`{"proxy-spec":{"proxy-port":"x"}}`)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Differ(t.Context(), Settings{}, file)
	var key *attribute.KeyError
	if !errors.Is(err, ErrSettings) || !errors.As(err, &key) || key.Key != "proxy-spec.proxy-port" {
		t.Errorf("%v", err)
	}
}
