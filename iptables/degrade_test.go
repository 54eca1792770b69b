package iptables

import (
	"errors"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// refusal is a kernel that lacks something, and what can be installed of sample's ruleset all the
// same. Addresses are IPv4's and stand for sample's of the other family.
type refusal struct {
	name   string
	refuse []string // rules with one of these in them
	left   []string // what is said to be left out, in this order
	jumps  []string
	rules  map[string][]string // what some chains hold then
}

const (
	uidOf999 = "-m owner --uid-owner 999 -m comment --comment proxy-user -j RETURN"
	gidOf998 = "-m owner --gid-owner 998 -m comment --comment proxy-group -j RETURN"
	uidOf101 = "-m owner --uid-owner 101 -m comment --comment local-resolver -j RETURN"
	tcpDNS   = "-p tcp -m tcp --dport 53 -j SERVICE_PROXY_DNS"
)

// sampleOutput is what SERVICE_PROXY_OUTPUT holds behind the rows for the proxy and DNS.
var sampleOutput = []string{
	"-d 127.0.0.0/8 -m comment --comment loopback -j RETURN", "-d 169.254.0.0/16 -m comment --comment link-local -j RETURN",
	"-d 169.254.169.254/32 -m comment --comment metadata-server -j RETURN", "-d 8.8.8.8/32 -m comment --comment excluded -j RETURN",
	"-p tcp -m tcp --dport 7 -m comment --comment excluded -j RETURN", "-p tcp -m tcp --dport 80:90 -m comment --comment excluded -j RETURN",
	"-j SERVICE_PROXY_SERVICE_CIDRS", "-j SERVICE_PROXY_SERVICE_PORTS",
}

var refusals = []refusal{
	{"no comment match", []string{"-m comment"}, []string{"-m comment"}, []string{jumpInbound, jumpOutput, jumpDNS}, map[string][]string{
		chainDNS: {"-m owner --uid-owner 999 -j RETURN", "-m owner --gid-owner 998 -j RETURN",
			"-m owner --uid-owner 101 -j RETURN",
			"-p udp -j REDIRECT --to-ports 15053", "-p tcp -j REDIRECT --to-ports 15053"},
	}},
	{"no owner match: outbound would loop", []string{"--uid-owner", "--gid-owner"}, []string{
		"-A SERVICE_PROXY_DNS " + uidOf999, "-A SERVICE_PROXY_DNS " + gidOf998, "-A SERVICE_PROXY_DNS " + uidOf101,
		"-A SERVICE_PROXY_OUTPUT " + uidOf999, "-A SERVICE_PROXY_OUTPUT " + gidOf998,
	}, []string{jumpInbound}, nil},
	{"one resolver's uid: DNS would loop, and over TCP from SERVICE_PROXY_OUTPUT as well", []string{"--uid-owner 101"}, []string{"-A SERVICE_PROXY_DNS " + uidOf101},
		[]string{jumpInbound, jumpOutput}, map[string][]string{
			chainOutput: slices.Concat([]string{uidOf999, gidOf998}, sampleOutput),
		}},
	{"no uid of the proxy", []string{"--uid-owner 999"}, []string{"-A SERVICE_PROXY_DNS " + uidOf999, "-A SERVICE_PROXY_OUTPUT " + uidOf999}, []string{jumpInbound}, map[string][]string{
		// its row for DNS leads to a chain that would loop
		chainOutput: slices.Concat([]string{gidOf998}, sampleOutput),
		chainDNS: {gidOf998, uidOf101, "-p udp -j REDIRECT --to-ports 15053",
			"-p tcp -j REDIRECT --to-ports 15053"},
	}},
	{"no gid of the proxy: its user is spared all the same", []string{"--gid-owner"}, []string{"-A SERVICE_PROXY_DNS " + gidOf998, "-A SERVICE_PROXY_OUTPUT " + gidOf998},
		[]string{jumpInbound, jumpOutput, jumpDNS}, map[string][]string{
			chainDNS: {uidOf999, uidOf101, "-p udp -j REDIRECT --to-ports 15053",
				"-p tcp -j REDIRECT --to-ports 15053"},
		}},
	{"no addrtype match: routed traffic would be taken", []string{"addrtype"}, []string{"-A SERVICE_PROXY_INBOUND " + ruleRouted},
		[]string{jumpOutput, jumpDNS}, map[string][]string{chainServicePorts: {
			"-p tcp -m tcp --dport 81 -j SERVICE_PROXY_REDIRECT", "-p tcp -m tcp --dport 8080 -j SERVICE_PROXY_REDIRECT"}}},
	{"one exclude", []string{"-d 8.8.8.8"}, []string{"-A SERVICE_PROXY_OUTPUT -d 8.8.8.8/32 -m comment --comment excluded -j RETURN"},
		[]string{jumpInbound, jumpOutput, jumpDNS}, map[string][]string{
			chainOutput: slices.Concat([]string{uidOf999, gidOf998, tcpDNS},
				slices.Delete(slices.Clone(sampleOutput), 3, 4)),
		}},
	{"no redirect of UDP: DNS stays out", []string{"-p udp -j REDIRECT"}, []string{"-A SERVICE_PROXY_DNS -p udp -j REDIRECT --to-ports 15053"},
		[]string{jumpInbound, jumpOutput},
		map[string][]string{chainOutput: slices.Concat([]string{uidOf999, gidOf998}, sampleOutput)}},
	{"no redirect at all: nothing leads to what does nothing", []string{"-j REDIRECT"}, []string{
		"-A SERVICE_PROXY_DNS -p udp -j REDIRECT --to-ports 15053", "-A SERVICE_PROXY_DNS -p tcp -j REDIRECT --to-ports 15053",
		"-A SERVICE_PROXY_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006", "-A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 15001",
	}, []string{jumpInbound, jumpOutput}, map[string][]string{
		chainServiceCIDRs: {}, chainServicePorts: {}, chainInbound: {ruleRouted}, chainRedirect: {},
		chainInRedirect: {}, chainDNS: {uidOf999, gidOf998, uidOf101},
	}},
	{"no tcp match: what has no port goes on", []string{"-m tcp"}, []string{
		"-A SERVICE_PROXY_INBOUND -p tcp -m tcp --dport 80 -j SERVICE_PROXY_IN_REDIRECT",
		"-A SERVICE_PROXY_INBOUND -d 10.0.0.9/32 -p tcp -m tcp --dport 81 -j SERVICE_PROXY_IN_REDIRECT",
		"-A SERVICE_PROXY_OUTPUT " + tcpDNS, "-A SERVICE_PROXY_OUTPUT " + sampleOutput[4], "-A SERVICE_PROXY_OUTPUT " + sampleOutput[5],
		"-A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 81 -j SERVICE_PROXY_REDIRECT", "-A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 8080 -j SERVICE_PROXY_REDIRECT",
	}, []string{jumpInbound, jumpOutput, jumpDNS}, map[string][]string{
		chainInbound: {ruleRouted}, chainServicePorts: {},
		chainOutput: slices.Concat([]string{uidOf999, gidOf998}, sampleOutput[:4], sampleOutput[6:]),
	}},
	{"a jump", []string{"-p udp -m udp --dport 53"}, []string{"-A OUTPUT " + jumpDNS}, []string{jumpInbound, jumpOutput}, map[string][]string{
		chainOutput: slices.Concat([]string{uidOf999, gidOf998, tcpDNS}, sampleOutput),
	}},
}

// inFamily is text with sample's addresses of IPv4 put into the family's.
func inFamily(f Family, text string) string {
	if f == IPv4 {
		return text
	}
	return strings.NewReplacer("8.8.8.8/32", "fd00:8::/32", "-d 8.8.8.8", "-d fd00:8::", "10.0.0.9/32",
		"fd00::9/128", "127.0.0.0/8", "::1/128", "169.254.0.0/16", "fe80::/10",
		"169.254.169.254/32", "fd20:ce::254/128").Replace(text)
}

func (test refusal) check(t *testing.T, k *Kernel, f Family) {
	t.Helper()
	read := func() Table {
		have, err := k.Read(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		return have
	}
	want := sample(f).Ruleset()
	tool, err := k.tool(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	_, isRefused, err := k.apply(t.Context(), tool, NewPlan(want, read()))
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Line == 0 || refused.Rule == "" ||
		refused.Family != f || !isRefused {
		t.Fatalf("%s: apply: %v, refused is %v", f, err, isRefused)
	}
	degraded, err := k.Apply(t.Context(), NewPlan(want, read()))
	if err != nil {
		t.Fatalf("%s: %v", f, err)
	}
	var left, jumps, wantLeft []string
	for _, l := range degraded.Left {
		left = append(left, l.Rule)
		if l.Stderr == "" || l.Family != f || l.Line != 0 {
			t.Errorf("%s %q: %+v", f, l.Rule, l)
		}
	}
	for _, rule := range test.left {
		wantLeft = append(wantLeft, inFamily(f, rule))
	}
	if !slices.Equal(left, wantLeft) {
		t.Errorf("%s: left out %q, want %q", f, left, wantLeft)
	}
	for _, j := range degraded.Ruleset.jumps {
		jumps = append(jumps, j.spec)
	}
	if !slices.Equal(jumps, test.jumps) {
		t.Errorf("%s: jumps %q, want %q", f, jumps, test.jumps)
	}
	have := read()
	if !have.Ours().Equal(degraded.Ruleset) {
		t.Errorf("%s: installed\n%s\nand said\n%s", f, have.Ours(), degraded.Ruleset)
	}
	if drift := Diff(degraded.Ruleset, degraded.Have); len(drift) > 0 {
		t.Errorf("%s: read back with %v", f, drift)
	}
	for name, rules := range test.rules {
		var inWords []string
		for _, spec := range rules {
			inWords = append(inWords, inFamily(f, spec))
		}
		if got := have.Rules(name); !have.Has(name) || !slices.Equal(got, inWords) {
			t.Errorf("%s: %s holds\n%q\nwant\n%q", f, name, got, inWords)
		}
	}
}

func TestARefusedRuleIsLeftOutAndNamed(t *testing.T) {
	for _, test := range refusals {
		t.Run(test.name, func(t *testing.T) {
			eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
				m.Refuse = func(rule string) bool {
					return slices.ContainsFunc(test.refuse, func(part string) bool {
						return strings.Contains(rule, inFamily(f, part))
					})
				}
				test.check(t, openInMemory(t, m), f)
			})
		})
	}
}

// Without the comment match every configuration is installed as it is but for the comments.
func TestWithoutCommentsNothingElseIsLost(t *testing.T) {
	comment := regexp.MustCompile(` -m comment --comment [a-z-]+`)
	for name, i := range interceptions() {
		for _, f := range families {
			i.Family = f
			m := &iptablestest.Machine{Backend: NFT, Refuse: func(rule string) bool {
				return strings.Contains(rule, "-m comment")
			}}
			degraded, err := openInMemory(t, m).Apply(t.Context(),
				NewPlan(i.Ruleset(), Table{family: f}))
			if err != nil {
				t.Fatal(err)
			}
			want := comment.ReplaceAllString(i.Ruleset().String(), "")
			if got := holds(m, NFT, f).String(); got != want || len(degraded.Left) > 1 ||
				len(degraded.Left) == 1 && degraded.Left[0].Rule != CommentMatch {
				t.Errorf("%s %s: left out %v, installed\n%s\nwant\n%s", name, f, degraded.Left, got, want)
			}
		}
	}
}

// restores counts those of a family, and says what else is to come of the n-th, counted from 1: ""
// lets it do its work.
func restores(m *iptablestest.Machine, f Family,
	answer func(n int, payload string) (stderr string, exit int)) *int {
	n := new(int)
	m.Before = func(program string, _ []string, stdin string) (string, int) {
		if stdin == "" || m.NAT(program) != m.NAT(programOf(m.Backend, f)) {
			return "", 0
		}
		*n++
		return answer(*n, stdin)
	}
	return n
}

// The kernel is asked about each kind of rule once, whatever addresses, ports and interfaces there
// are.
func TestEachKindOfRuleIsAskedAboutOnce(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		asked := func(refuse string, i Interception) int {
			m.Refuse = func(rule string) bool { return strings.Contains(rule, refuse) }
			n := restores(m, f, func(int, string) (string, int) { return "", 0 })
			k := openInMemory(t, m)
			if degraded, err := k.Apply(t.Context(),
				NewPlan(i.Ruleset(), Table{family: f})); err != nil || len(degraded.Left) != 1 {
				t.Fatalf("%v, left out %v", err, degraded.Left)
			}
			asked := *n
			if _, err := k.Cleanup(t.Context()); err != nil {
				t.Fatal(err)
			}
			return asked
		}
		few := Interception{Family: f, ProxyUID: 999, ProxyGID: 998, Jumps: true, OutboundPort: 15001,
			All: true, Services: randomPrefixes(f, 1, 1), ServicePorts: []uint16{80},
			ExcludePrefixes: randomPrefixes(f, 1, 2), ExcludePorts: []PortRange{{1, 2}},
			Interfaces: []string{"eth1"}, InboundPort: 15006, Serving: []Serving{{Port: 80}}}
		many := few
		many.ExcludePrefixes, many.ServicePorts = randomPrefixes(f, 50, 2), []uint16{80, 81, 82}
		many.ExcludePorts, many.Interfaces = []PortRange{{1, 2}, {4, 4}, {5, 9}},
			[]string{"eth1", "eth2", "br-+"}
		many.Serving = append(many.Serving, Serving{Port: 81}, Serving{Port: 82})
		if one, more := asked("--comment root", few), asked("--comment root", many); one != more {
			t.Errorf("%d restores for few rules and %d for many of the same kinds", one, more)
		}
		few.All, many.All = false, false
		few.Services, many.Services = randomPrefixes(f, 300, 1), randomPrefixes(f, 3000, 1)
		// Legacy makes many new chains before each of the two plans.
		if one, more := asked("--comment proxy-group", few),
			asked("--comment proxy-group", many); more > one+2 {
			t.Errorf("%d restores for 300 services and %d for 3000", one, more)
		}
	})
}

// What is taken as a whole is not taken apart.
func TestApplyOfAKernelThatTakesEverything(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		n := restores(m, f, func(int, string) (string, int) { return "", 0 })
		want := sample(f).Ruleset()
		degraded, err := openInMemory(t, m).Apply(t.Context(), NewPlan(want, Table{family: f}))
		if err != nil || len(degraded.Left) > 0 || !degraded.Ruleset.Equal(want) ||
			!holds(m, m.Backend, f).Equal(want) || *n != 1 {
			t.Errorf("%v, left out %v, %d restores, installed\n%s", err, degraded.Left, *n,
				holds(m, m.Backend, f))
		}
	})
}

// When it cannot be found out what is refused, that is an error, and no part of the ruleset is
// installed.
func TestApplyOfARefusedRuleThatFails(t *testing.T) {
	const (
		refusedLine = "iptables-restore: line 12 failed\n" // of what no kind of rule is
		locked      = "Another app is currently holding the xtables lock. Stopped waiting after 5s.\n"
	)
	isProbe := func(payload string) bool { return strings.Contains(payload, chainProbe) }
	asksFor := func(payload string) bool {
		return isProbe(payload) && strings.Contains(payload, "\n-A ")
	}
	for _, test := range []struct {
		name    string
		answer  func(n int, payload string) (string, int)
		refused bool   // the error is a *RefusedError
		is      error  // and this
		says    string // and says this
	}{
		{"a held lock", func(int, string) (string, int) { return locked, 4 }, false, ErrLocked, "apply"},
		{"a held lock when a rule is asked about", func(_ int, payload string) (string, int) {
			if isProbe(payload) {
				return locked, 4
			}
			return refusedLine, 1
		}, true, ErrLocked, "could not find out which rule"},
		{"a held lock when it is taken out again", func(_ int, payload string) (string, int) {
			switch {
			case asksFor(payload):
				return "", 0
			case isProbe(payload):
				return locked, 4
			}
			return refusedLine, 1
		}, true, ErrLocked, "remove probe"},
		{"a held lock when a jump is asked about", func(_ int, payload string) (string, int) {
			if asksFor(payload) && strings.Contains(payload, "proxy-group") {
				return "iptables-restore: line 3 failed\n", 1
			}
			if asksFor(payload) && strings.Contains(payload, " -p tcp -j RETURN\n") { // the last
				return locked, 4
			}
			if isProbe(payload) {
				return "", 0
			}
			return refusedLine, 1
		}, true, ErrLocked, "could not find out which rule"},
		// Somebody else wrote at the same moment.
		{"each rule by itself is taken", func(_ int, payload string) (string, int) {
			if isProbe(payload) {
				return "", 0
			}
			return refusedLine, 1
		}, true, nil, "line 12"},
		{"what is left is refused too", func(_ int, payload string) (string, int) {
			if isProbe(payload) && !strings.Contains(payload, "proxy-group") {
				return "", 0
			}
			if isProbe(payload) {
				return "iptables-restore: line 3 failed\n", 1
			}
			return refusedLine, 1
		}, true, nil, "line 12"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
				restores(m, f, test.answer)
				_, err := openInMemory(t, m).Apply(t.Context(),
					NewPlan(sample(f).Ruleset(), Table{family: f}))
				var refused *RefusedError
				if err == nil || errors.As(err, &refused) != test.refused ||
					test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("error %v, want one that is %v, of a refused rule %v, and says %q", err, test.is,
						test.refused, test.says)
				}
				left := holds(m, m.Backend, f)
				// the probe may be there, with its one rule, and nothing leads to it
				if left.Intercepting() || left.Len() > 1 {
					t.Errorf("there is\n%s", left)
				}
			})
		})
	}
}

// When what is there cannot be seen after the asking, nothing is said to be installed.
func TestApplyOfARefusedRuleThatCannotLook(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		k := openInMemory(t, m)
		m.Refuse = func(rule string) bool { return strings.Contains(rule, "proxy-group") }
		asked := false
		m.Before = func(program string, _ []string, stdin string) (string, int) {
			asked = asked || strings.Contains(stdin, chainProbe)
			if asked && strings.HasSuffix(program, "-save") {
				return "Another app is currently holding the xtables lock. Stopped waiting after 5s.\n", 4
			}
			return "", 0
		}
		degraded, err := k.Apply(t.Context(), NewPlan(sample(f).Ruleset(), Table{family: f}))
		if !errors.Is(err, ErrLocked) || !degraded.Ruleset.Empty() || !holds(m, m.Backend, f).Empty() {
			t.Errorf("%v, installed\n%s", err, degraded.Ruleset)
		}
	})
}

// A refusal stays one where it could not be found out in time which rules the kernel takes.
func TestRefusedAndThenNoAnswerInTime(t *testing.T) {
	m := &iptablestest.Machine{Backend: NFT,
		Refuse: func(rule string) bool { return strings.Contains(rule, "-m owner") },
		Before: func(_ string, _ []string, stdin string) (string, int) {
			if strings.Contains(stdin, chainProbe) {
				return "", -1
			}
			return "", 0
		}}
	_, err := openInMemory(t, m).Apply(
		t.Context(), NewPlan(sample(IPv4).Ruleset(), Table{family: IPv4}))
	var refused *RefusedError
	if errors.Is(err, ErrCouldNotLook) || !errors.As(err, &refused) ||
		!strings.Contains(refused.Rule, "-m owner") {
		t.Errorf("got %v", err)
	}
}

// A family that is not usable is said to be so, before anything is asked.
func TestApplyOfAFamilyThatIsNotUsable(t *testing.T) {
	m := &iptablestest.Machine{Backend: Legacy, Before: func(program string, args []string, _ string) (
		string, int) {
		if strings.Contains(program, "ip6tables") && slices.Contains(args, "-S") {
			return "ip6tables v1.8.7 (legacy): can't initialize ip6tables table `nat': Table does not exist (do you need to insmod?)\n", 3
		}
		return "", 0
	}}
	if _, err := openInMemory(t, m).Apply(t.Context(),
		NewPlan(sample(IPv6).Ruleset(), Table{family: IPv6})); !errors.Is(err, ErrUnusable) ||
		!errors.Is(err, ErrNoTable) {
		t.Errorf("got %v", err)
	}
}

// A line that is refused is named by its words, which is how people find it.
func TestTheRefusedLineIsNamed(t *testing.T) {
	plan := NewPlan(serviceSet(IPv4, nil), Table{family: IPv4})
	lines := strings.Split(strings.TrimSuffix(plan.String(), "\n"), "\n")
	for n := -1; n < len(lines)+3; n++ {
		want := ""
		if n >= 1 && n <= len(lines) {
			want = lines[n-1]
		}
		err := refused(plan, &CommandError{Command: "iptables-restore", Exit: 1, Stderr: "line " +
			strconv.Itoa(n) + " failed"})
		var refusal *RefusedError
		if n < 0 {
			if errors.As(err, &refusal) {
				t.Errorf("line %d: %v", n, err)
			}
			continue
		}
		if !errors.As(err, &refusal) || refusal.Rule != want || refusal.Line != n ||
			refusal.Family != IPv4 {
			t.Errorf("line %d: %+v, want %q", n, refusal, want)
		}
	}
}
