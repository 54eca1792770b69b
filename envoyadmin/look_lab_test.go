//go:build lab

package envoyadmin

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// oddNames have all that a regular expression, a query string or JSON gives a meaning to.
var oddNames = []string{"plain", "a b", "a+b", "a&b=c#d?e", "a%2fb%", "ü→漢字", "x|y", `\Qx\E\d`,
	"(^.*$)[a]{2}", `"q" 'r'`, "/slash;semi", "GLOBAL:global/PROJECT:12", "Plain", "plain2"}

// TestExpression: each name is found by the expression of all, which is no larger than Envoy takes
// and than is thought, on real Envoys; what begins otherwise is not.
func TestExpression(t *testing.T) {
	sizes := regexp.MustCompile(`program size of (\d+)`)
	var longs, odds []string
	for i := range 19 {
		longs = append(longs, fmt.Sprintf("%s-%d", strings.Repeat("LISTENER/", 11), 1<<i))
	}
	for _, name := range oddNames {
		odds = append(odds, "odd "+name)
	}
	sets := [][]string{longs, odds, {"ü→漢字漢字", "ü→漢漢字漢"},
		{"one", "one more", "one more still"}}
	for _, name := range append(slices.Clone(oddNames), strings.Repeat(`long\`, 400)) {
		sets = append(sets, []string{name}, []string{name, "other than all"})
	}
	w := pushed{"none of them": 9}
	for _, names := range sets {
		if !Nameable(names) {
			t.Fatalf("%.60q: not nameable", names)
		}
		for i, name := range names {
			w[name] = i
		}
	}
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			e := start(t, version, w.yaml())
			e.dumped(len(w))
			sized := start(t, version, "", "static_resources:", `layered_runtime: {layers: [
  {name: x, static_layer: {re2.max_program_size.error_level: 0}}]}
static_resources:`)
			for _, names := range sets {
				found := &dump{}
				if err := e.client.readDump(t.Context(), namedPath(names), 5*time.Second, maxShort, found,
					found.dynamicListener); err != nil {
					t.Fatalf("%.60q: %v", names, err)
				}
				cut := strings.Contains(expression(names), `\C`)
				if got := found.distinctNames(); !contains(got, names) || len(got) == len(w) ||
					!cut && len(got) > len(names) {
					t.Errorf("found %.60q, want %.60q", got, names)
				}
				m := sizes.FindSubmatch(sized.fetch(namedPath(names)))
				if m == nil {
					t.Fatalf("%.60q: no size is told", names)
				}
				if n, _ := strconv.Atoi(string(m[1])); n > maxProgram || n > programOf(names) {
					t.Errorf("%.60q: %d instructions, thought of %d", names, n, programOf(names))
				}
			}
		})
	}
}

// programOf is the size that the expression of names is thought to have.
func programOf(names []string) int {
	re := expression(names)
	_, rest, _ := strings.Cut(re, "^"+regexp.QuoteMeta(commonPrefix(names)))
	return 5 + 3*strings.Count(rest, `\C*`) + len(rest)
}

// pushed are the listeners that a test pushes: their names, and a number that stands in the one
// filter chain of each, or -1 for a chain that Envoy refuses.
type pushed map[string]int

func (w pushed) yaml() string {
	var b strings.Builder
	names := make([]string, 0, len(w))
	for name := range w {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		h := fnv.New32()
		h.Write([]byte(name))
		own := h.Sum32() // an address of its own
		prefix := fmt.Sprintf("10.1.%d.%d", w[name]/256, w[name]%256)
		if w[name] < 0 {
			prefix = "not-an-address"
		}
		fmt.Fprintf(&b, `
- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: '%s'
  address: {socket_address: {address: 10.9.%d.%d, port_value: 80}}
  bind_to_port: false
  filter_chains:
  - filter_chain_match: {prefix_ranges: [{address_prefix: %s, prefix_len: 32}]}
    filters:
    - name: tcp
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
        stat_prefix: x
        cluster: a
`, strings.ReplaceAll(name, "'", "''"), own>>8&255, own&255, prefix)
	}
	return b.String()
}

// dumped waits for so many dynamic listeners and dumps them. From then on it is asked by names,
// small as it is.
func (e *envoy) dumped(n int) (s Snapshot) {
	e.t.Helper()
	e.client.namedFrom = 0
	e.until(10*time.Second, func() (err error) {
		s, err = e.client.Listeners(context.Background())
		if err == nil && (len(s.Names) != n || s.Fingerprint.Warming > 0) {
			err = fmt.Errorf("%d listeners: %q", len(s.Names), s.Names)
		}
		return err
	})
	return s
}

// looks asks by names and without, and says how many questions the first took: two by names alone.
func (e *envoy) looks(names []string) (named, whole Fingerprint, questions uint64) {
	e.t.Helper()
	before := e.client.Asked().Questions[LookQuestion].Count
	named, err := e.client.Fingerprint(context.Background(), names)
	if err != nil {
		e.t.Fatal(err)
	}
	questions = e.client.Asked().Questions[LookQuestion].Count - before
	if whole, err = e.client.Fingerprint(context.Background(), nil); err != nil {
		e.t.Fatal(err)
	}
	return named, whole, questions
}

// drainsOther says whether a listener of another name has gone, and still drains: a look by names
// does not see it, as it does not see one that warms.
func (e *envoy) drainsOther(names []string) bool {
	e.t.Helper()
	d := &dump{}
	if err := e.client.readDump(e.t.Context(), maskedPath, 5*time.Second, maxShort, d,
		d.dynamicListener); err != nil {
		e.t.Fatal(err)
	}
	rejected := func(name string) bool {
		return slices.ContainsFunc(d.rejected, func(r Rejected) bool { return r.Name == name })
	}
	return slices.ContainsFunc(d.idle, func(name string) bool {
		return name != "" && !slices.Contains(names, name) && !rejected(name)
	})
}

// TestNamed: a look by names tells what a look at all does, whatever the names are, in all that may
// happen to a listener; and it does so without a look at all while nothing moves.
func TestNamed(t *testing.T) {
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			w := pushed{}
			for i, name := range oddNames[:10] {
				w[name] = i
			}
			e := start(t, version, w.yaml())
			s := e.dumped(len(w))
			if want := slices.Sorted(slices.Values(oddNames[:10])); !slices.Equal(s.Names, want) ||
				!Nameable(s.Names) {
				t.Fatalf("got %q, want %q", s.Names, want)
			}
			named, whole, questions := e.looks(s.Names)
			if named != s.Fingerprint || whole != s.Fingerprint || questions != 2 {
				t.Fatalf("by names %+v in %d questions, of all %+v, dumped %+v",
					named, questions, whole, s.Fingerprint)
			}
			for _, step := range []struct {
				what      string
				do        func()
				questions uint64 // 2: by names; 3: and of all, since one has come; 0: either
			}{
				{"a chain is another", func() { w["x|y"] = 500 }, 2},
				{"refused", func() { w["a b"] = -1 }, 2},
				{"refused otherwise", func() { w["a b"] = 7; w["a+b"] = -1 }, 2},
				{"taken again", func() { w["a+b"] = 9 }, 2},
				{"one that is new is refused", func() { w["new"] = -1 }, 2},
				{"it is taken", func() { w["new"] = 600 }, 2},
				{"one is gone", func() { delete(w, `\Qx\E\d`) }, 0}, // or is draining
				{"one has come", func() { w["elsewhere"] = 601 }, 3},
				{"one has another name", func() { delete(w, "new"); w["newest"] = 600 }, 0},
			} {
				s = e.dumped(len(s.Names))
				step.do()
				e.listeners(w.yaml())
				e.until(5*time.Second, func() error {
					if f, err := e.client.Fingerprint(t.Context(), nil); err != nil || f == s.Fingerprint {
						return fmt.Errorf("%s: nothing moves, %v", step.what, err)
					}
					return nil
				})
				e.until(5*time.Second, func() error {
					named, whole, questions := e.looks(s.Names)
					if named != whole || step.questions > 0 && questions != step.questions {
						return fmt.Errorf("%s: by names %+v in %d questions, of all %+v",
							step.what, named, questions, whole)
					}
					return nil
				})
				e.until(5*time.Second, func() error {
					after, err := e.client.Listeners(t.Context())
					if err != nil {
						return err
					}
					named, whole, questions := e.looks(after.Names)
					if named != after.Fingerprint || whole != named || questions != 2 {
						return fmt.Errorf("%s: by names %+v in %d questions, of all %+v, dumped %+v",
							step.what, named, questions, whole, after.Fingerprint)
					}
					s = after
					return nil
				})
			}
		})
	}
}

// TestNamedRandomly changes listeners at random, stops Envoy at random, and asks with names that
// may be of some time ago: what is told is what a look at all tells.
func TestNamedRandomly(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rounds := 10
	if os.Getenv("SOAK") != "" {
		rounds = 400
	}
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			w := pushed{"plain": 1, "a b": 2}
			e := start(t, version, w.yaml())
			s := e.dumped(len(w))
			compared, moved := 0, 0
			for range rounds {
				for range 1 + r.IntN(3) {
					name := oddNames[r.IntN(len(oddNames))]
					switch r.IntN(4) {
					case 0:
						delete(w, name)
					case 1:
						w[name] = -1
					default:
						w[name] = r.IntN(60_000)
					}
				}
				e.listeners(w.yaml())
				if r.IntN(3) == 0 {
					pause := time.Duration(r.IntN(30)) * time.Millisecond
					e.cmd.Process.Signal(syscall.SIGSTOP)
					time.AfterFunc(pause, func() { e.cmd.Process.Signal(syscall.SIGCONT) })
				}
				for range 4 {
					before, err := e.client.Fingerprint(t.Context(), nil)
					if err != nil {
						t.Fatal(err)
					}
					named, after, _ := e.looks(s.Names)
					if before == after {
						compared++
						if named != after && !e.drainsOther(s.Names) {
							t.Fatalf("seed %d, names %q: by them %+v, of all %+v", seed, s.Names, named, after)
						}
					}
					time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
				}
				if r.IntN(2) == 0 {
					was := s.Fingerprint
					var err error
					if s, err = e.client.Listeners(t.Context()); err != nil {
						t.Fatal(err)
					}
					if s.Fingerprint != was {
						moved++
					}
				}
			}
			t.Logf("%d looks compared, %d dumps differed", compared, moved)
			if compared < rounds || moved == 0 {
				t.Errorf("only %d looks compared, %d dumps differed", compared, moved)
			}
		})
	}
}

// TestNamedRefused: an Envoy that does not answer by names, or answers otherwise, is soon asked of
// all alone, and told right from the first.
func TestNamedRefused(t *testing.T) {
	for _, test := range []struct {
		name    string
		yaml    func(w pushed) string
		replace []string
		since   string
		first   uint64 // questions of the first look
		limit   int    // looks until there is one question each
	}{
		// Envoy makes a name up, by which it does not find the listener.
		{"no name", func(w pushed) string { return strings.Replace(w.yaml(), "'plain'", "''", 1) },
			nil, "", 2, misledLimit},
		{"short expressions", pushed.yaml, []string{"static_resources:", `layered_runtime: {layers: [
  {name: x, static_layer: {re2.max_program_size.error_level: 5}}]}
static_resources:`}, "", 2, 1},
		{"few paths", pushed.yaml, []string{"admin: {",
			"admin: {allow_paths: [{exact: /ready}, {exact: /server_info}, {prefix: /config_dump}], "},
			"1.37.0", 3, 1},
	} {
		for _, version := range envoyVersions {
			t.Run(test.name+"/"+version, func(t *testing.T) {
				v, err := ParseVersion(version)
				if since, _ := ParseVersion(test.since); err != nil || v.Less(since) {
					return // this Envoy does not know the setting
				}
				w := pushed{"plain": 1, "second": 2}
				e := start(t, version, test.yaml(w), test.replace...)
				s := e.dumped(len(w))
				if !Nameable(s.Names) {
					t.Fatalf("names %q", s.Names)
				}
				for i := range test.limit + 2 {
					named, whole, questions := e.looks(s.Names)
					want := test.first
					if i >= test.limit {
						want = 1
					}
					if named != whole || named != s.Fingerprint || questions != want {
						t.Errorf("look %d: by names %+v in %d questions, want %d; of all %+v, dumped %+v",
							i, named, questions, want, whole, s.Fingerprint)
					}
				}
			})
		}
	}
}

// TestNamedBehind: an Envoy whose static listener has no name is asked by names all the same, and
// so is another one that takes its place.
func TestNamedBehind(t *testing.T) {
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			w := pushed{"plain": 1, "second": 2}
			e := start(t, version, w.yaml(), "name: of-the-bootstrap", "name: ''")
			s := e.dumped(len(w))
			if named, _, questions := e.looks(s.Names); named != s.Fingerprint || questions != 2 {
				t.Errorf("%+v in %d questions, dumped %+v", named, questions, s.Fingerprint)
			}
			e.cmd.Process.Kill()
			e.cmd.Wait()
			e.run()
			// Its static listeners are not known yet.
			e.until(5*time.Second, func() error {
				named, whole, questions := e.looks(s.Names)
				if named != whole || questions != 1 || named.Process == s.Fingerprint.Process {
					return fmt.Errorf("%+v in %d questions, of all %+v", named, questions, whole)
				}
				return nil
			})
			s = e.dumped(len(w))
			if named, _, questions := e.looks(s.Names); named != s.Fingerprint || questions != 2 {
				t.Errorf("%+v in %d questions, dumped %+v", named, questions, s.Fingerprint)
			}
		})
	}
}
