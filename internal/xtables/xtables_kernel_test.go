//go:build kernel

package xtables

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// family is one of the two, in the words of the tests.
type family struct {
	af       int
	program  string
	loopback string
	address  func(n int) string
	names    string
}

var families = []family{
	{unix.AF_INET, "iptables-legacy", "127.0.0.1:9", func(n int) string {
		return fmt.Sprintf("10.%d.%d.%d/32", n>>16&0xff, n>>8&0xff, n&0xff)
	}, "/proc/thread-self/net/ip_tables_names"},
	{unix.AF_INET6, "ip6tables-legacy", "[::1]:9", func(n int) string {
		return fmt.Sprintf("fd00::%x:%x/128", n>>16&0xff+1, n&0xffff+1)
	}, "/proc/thread-self/net/ip6_tables_names"},
}

func (f family) open(t testing.TB) *Socket {
	t.Helper()
	s, err := Open(f.af)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (f family) save(t testing.TB, args ...string) string {
	t.Helper()
	return sh(t, "", f.program+"-save", append([]string{"-t", "nat"}, args...)...)
}

var volatile = regexp.MustCompile(`(?m)^#.*$|\[\d+:\d+\]`)

// rules is the save without the time and the counters.
func (f family) rules(t testing.TB) string {
	t.Helper()
	return volatile.ReplaceAllString(f.save(t), "")
}

func (f family) restore(t testing.TB, text string) {
	t.Helper()
	sh(t, "*nat\n"+text+"COMMIT\n", f.program+"-restore", "--noflush", "-w", "5")
}

func print(t testing.TB, s *Socket) Print {
	t.Helper()
	p, err := s.Print("nat")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := s.Info("nat"); err != nil || info != p.Info {
		t.Fatalf("Info is %+v (%v), in the Print it is %+v", info, err, p.Info)
	}
	return p
}

// TestPrintMovesWithTheRules: whatever somebody does to a table, the Print moves when that shows in
// iptables-legacy-save, and comes back when the save does; and packets do not move it.
func TestPrintMovesWithTheRules(t *testing.T) {
	if !inNetns(t) {
		return
	}
	edits := 60
	if os.Getenv("SOAK") == "1" {
		edits = 1000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for _, f := range families {
		t.Run(f.program, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, uint64(f.af)))
			s := f.open(t)
			f.restore(t, f.first(r))
			prints := map[string]Print{}
			seen := map[Print]string{}
			var moved, byInfo, bySum, counted int
			rules, last := f.rules(t), print(t, s)
			for range edits {
				text := f.edit(r, rules)
				f.restore(t, text)
				now, p := f.rules(t), print(t, s)
				if (now == rules) != (p == last) {
					t.Fatalf("the save changed: %v, the print: %v, after\n%s", now != rules, p != last, text)
				}
				if known, ok := prints[now]; ok && known != p {
					t.Errorf("the same save, %+v and %+v, after\n%s", known, p, text)
				}
				if known, ok := seen[p]; ok && known != now {
					t.Errorf("the same print of two saves:\n%s\n%s", known, now)
				}
				prints[now], seen[p] = p, now
				if now != rules {
					moved++
					if p.Info != last.Info {
						byInfo++
					} else {
						bySum++
					}
				}
				rules, last = now, p
				counters := f.save(t, "-c")
				packets(t, f.loopback)
				if p := print(t, s); p != last {
					t.Fatalf("traffic moved the print, after\n%s", text)
				}
				if f.save(t, "-c") != counters {
					counted++
				}
			}
			t.Logf("%d edits, %d changed the save: Info saw %d, the hash alone %d", edits, moved, byInfo,
				bySum)
			// Under a policy DROP no counter moves.
			if byInfo == 0 || bySum == 0 || counted < edits/4 {
				t.Errorf("they show too little; counters moved %d times", counted)
			}
		})
	}
}

// first is a table to begin with, most rules of one size.
func (f family) first(r *rand.Rand) string {
	var b strings.Builder
	for c := range 4 {
		fmt.Fprintf(&b, ":CHAIN%d - [0:0]\n-A OUTPUT -p tcp -j CHAIN%d\n", c, c)
	}
	for range 40 {
		fmt.Fprintf(&b, "-A CHAIN%d %s\n", r.IntN(4), f.rule(r))
	}
	return b.String()
}

// rule is a rule that somebody may write.
func (f family) rule(r *rand.Rand) string {
	to := "-d " + f.address(r.IntN(64))
	switch r.IntN(8) {
	case 0:
		return fmt.Sprintf("%s -p tcp -m tcp --dport %d -j RETURN", to, 1+r.IntN(9))
	case 1:
		return fmt.Sprintf("-p tcp -j REDIRECT --to-ports %d", 15001+r.IntN(9))
	case 2:
		return fmt.Sprintf("%s -m comment --comment c%d -j ACCEPT", to, r.IntN(9))
	case 3:
		return fmt.Sprintf("%s -m limit --limit %d/sec -j RETURN", to, 1+r.IntN(9))
	case 4:
		return fmt.Sprintf("-o eth%d -m owner --uid-owner %d -j RETURN", r.IntN(9), r.IntN(9))
	}
	return to + " -j RETURN"
}

// edit is a restore that changes something, or puts the same there again.
func (f family) edit(r *rand.Rand, rules string) string {
	chain := fmt.Sprintf("CHAIN%d", r.IntN(4))
	var of []string
	for line := range strings.Lines(rules) {
		if rule, ok := strings.CutPrefix(line, "-A "+chain+" "); ok {
			of = append(of, strings.TrimSpace(rule))
		}
	}
	at := 1 + r.IntN(len(of)+1)
	n := r.IntN(12)
	if at > len(of) && n > 2 { // there is nothing to change
		n = 0
	}
	switch n {
	case 0, 1:
		return fmt.Sprintf("-I %s %d %s\n", chain, at, f.rule(r))
	case 2:
		if strings.Contains(rules, ":EXTRA ") {
			return "-X EXTRA\n"
		}
		return ":EXTRA - [0:0]\n"
	case 3, 4:
		return fmt.Sprintf("-D %s %d\n", chain, at)
	case 5: // the same size, most often
		return fmt.Sprintf("-R %s %d %s\n", chain, at, f.rule(r))
	case 6: // the same again
		return fmt.Sprintf("-R %s %d %s\n", chain, at, of[at-1])
	case 7: // another order
		r.Shuffle(len(of), func(i, j int) { of[i], of[j] = of[j], of[i] })
		return "-F " + chain + "\n-A " + chain + " " + strings.Join(of, "\n-A "+chain+" ") + "\n"
	case 8: // to another chain
		return fmt.Sprintf("-D %s %d\n-A CHAIN%d %s\n", chain, at, r.IntN(4), of[at-1])
	case 9: // the order of jumps
		jump := fmt.Sprintf("OUTPUT -p tcp -j %s\n", chain)
		return "-D " + jump + "-A " + jump
	case 10:
		return fmt.Sprintf(":OUTPUT %s [0:0]\n", []string{"ACCEPT", "DROP"}[r.IntN(2)])
	}
	if r.IntN(4) > 0 {
		return "-Z\n"
	}
	return "-F " + chain + "\n"
}

// packets sends a few by the table: the first of a connection is asked for.
func packets(t testing.TB, to string) {
	t.Helper()
	for range 3 {
		c, err := net.Dial("udp", to)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("x")) // DROP says so here
		c.Close()
	}
	if c, err := net.DialTimeout("tcp", to, 10*time.Millisecond); err == nil {
		c.Close()
	}
}

// TestAskingMakesTheTable is why nobody may ask who does not know that the table is there.
func TestAskingMakesTheTable(t *testing.T) {
	if !inNetns(t) {
		return
	}
	for _, f := range families {
		has := func() bool {
			names, err := os.ReadFile(f.names)
			if err != nil {
				t.Fatal(err)
			}
			return slices.Contains(strings.Fields(string(names)), "nat")
		}
		if has() {
			t.Fatal("a new namespace has a table nat")
		}
		if _, err := f.open(t).Info("nat"); err != nil {
			t.Fatal(err)
		}
		if !has() {
			t.Errorf("%s: asking no longer makes the table: the rule can go", f.program)
		}
	}
}

// TestRefused: what may not be asked says so.
func TestRefused(t *testing.T) {
	if !inNetns(t) {
		return
	}
	if os.Geteuid() == 0 {
		for _, f := range families {
			sh(t, "", f.program, "-t", "nat", "-N", "CHAIN")
			s := f.open(t)
			if _, err := s.Print("no such table"); !errors.Is(err, ErrNoTable) {
				t.Errorf("a table that is not there: %v", err)
			}
			s.Close()
			if _, err := s.Print("nat"); !errors.Is(err, os.ErrClosed) {
				t.Errorf("a closed socket: %v", err)
			}
		}
		anew(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
		// As the agent's unit runs it.
		anew(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65533},
			AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}})
		return
	}
	for _, f := range families {
		s := f.open(t)
		_, infoErr := s.Info("nat")
		_, err := s.Print("nat")
		if capable := os.Getegid() == 65533; capable && errors.Join(infoErr, err) != nil {
			t.Errorf("with CAP_NET_ADMIN: %v, %v", infoErr, err)
		} else if !capable && (!errors.Is(infoErr, ErrRefused) || !errors.Is(err, ErrRefused)) {
			t.Errorf("without a capability: %v, %v", infoErr, err)
		}
	}
}

// TestPrintWhileOthersWrite: a Print is of one state of the table, or there is none.
func TestPrintWhileOthersWrite(t *testing.T) {
	if !inNetns(t) {
		return
	}
	f := families[0]
	s := f.open(t)
	states := []string{"-F\n-A OUTPUT -d 10.0.0.1/32 -j RETURN\n", "-F\n"}
	want := map[Print]bool{}
	for _, text := range states {
		f.restore(t, text)
		want[print(t, s)] = true
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for n := range 40 {
			f.restore(t, states[n%2])
		}
	}()
	looks := 0
	for {
		select {
		case <-ended:
			t.Logf("%d looks", looks)
			return
		default:
		}
		p, err := s.Print("nat")
		if err != nil && !errors.Is(err, ErrBusy) || err == nil && !want[p] {
			t.Fatalf("a print of neither state: %+v, %v", p, err)
		}
		looks++
	}
}

// BenchmarkLook measures what a look costs at 10,000 rules beside iptables-legacy-save.
func BenchmarkLook(b *testing.B) {
	if os.Getenv("XTABLES_TEST_NETNS") == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^$", "-test.bench=^BenchmarkLook$",
			"-test.benchtime=100x")
		cmd.Env = append(os.Environ(), "XTABLES_TEST_NETNS=BenchmarkLook")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		b.Logf("in its namespace: %v\n%s", err, out)
		return
	}
	for _, f := range families {
		var text strings.Builder
		text.WriteString(":SERVICES - [0:0]\n")
		for n := range 10000 {
			fmt.Fprintf(&text, "-A SERVICES -d %s -j RETURN\n", f.address(n))
		}
		f.restore(b, text.String())
		s := f.open(b)
		b.Run(f.program+"/info", func(b *testing.B) {
			for b.Loop() {
				if _, err := s.Info("nat"); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(f.program+"/print", func(b *testing.B) {
			for b.Loop() {
				print(b, s)
			}
		})
		b.Run(f.program+"/save", func(b *testing.B) {
			for b.Loop() {
				f.save(b)
			}
		})
	}
}

// inNetns runs the calling test in a network namespace of its own, in a copy of the test binary. It
// needs root.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv("XTABLES_TEST_NETNS") == t.Name() {
		if os.Geteuid() == 0 {
			sh(t, "", "ip", "link", "set", "lo", "up")
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it makes a network namespace")
	}
	anew(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET})
	return false
}

// anew runs this test in a new process.
func anew(t *testing.T, attributes *syscall.SysProcAttr) {
	t.Helper()
	limit := "1m"
	if os.Getenv("SOAK") == "1" {
		limit = "20m"
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1",
		"-test.timeout="+limit, "-test.v")
	cmd.Env = append(os.Environ(), "XTABLES_TEST_NETNS="+t.Name())
	cmd.SysProcAttr = attributes
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in its process: %v\n%s", err, out)
	} else {
		t.Logf("\n%s", out)
	}
}

func sh(t testing.TB, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, stderr.String(), stdin)
	}
	return out.String()
}
