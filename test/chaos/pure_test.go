package chaos

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func names(sequence []Event) (all []string) {
	for _, e := range sequence {
		all = append(all, e.Name)
	}
	return all
}

func TestFormat(t *testing.T) {
	in := []Event{{At: 1500 * time.Millisecond, Name: "a", Hold: time.Second, Seed: 7}, {Name: Calm}}
	out, err := Parse("# a comment\n\n" + Format(in))
	if err != nil || !cmp.Equal(in, out) {
		t.Errorf("%v %s", err, cmp.Diff(in, out))
	}
	for _, bad := range []string{"a", "1s a 2s", "1 a 2s 3", "1s a 2s -3", "1s a x 3"} {
		if _, err := Parse(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// TestGenerate: the same seed is the same game, it ends with a calm, and no two of one group meet.
func TestGenerate(t *testing.T) {
	faults := []Fault{{Name: "a", Weight: 1, Group: "g", Shortest: time.Second, Longest: 9 * time.Second},
		{Name: "b", Weight: 3, Group: "g"}, {Name: "c", Weight: 1, Longest: time.Second}}
	draw := func(seed uint64) []Event {
		return Generate(rand.New(rand.NewPCG(seed, 0)), faults, time.Minute, 20*time.Second)
	}
	if a, b := draw(1), draw(1); !cmp.Equal(a, b) {
		t.Error("one seed, two games")
	}
	for seed := range uint64(100) {
		sequence := draw(seed)
		calms := 0
		var busy time.Duration
		for _, e := range sequence {
			switch e.Name {
			case Calm:
				calms++
				busy = 0
			case "a", "b":
				if e.At < busy {
					t.Fatalf("seed %d: two of one group:\n%s", seed, Format(sequence))
				}
				busy = e.At + e.Hold
			}
		}
		if calms != 3 || sequence[len(sequence)-1].Name != Calm || len(sequence) < 10 {
			t.Fatalf("seed %d: %d calms\n%s", seed, calms, Format(sequence))
		}
	}
}

func TestShrink(t *testing.T) {
	var sequence []Event
	for i := range 40 {
		sequence = append(sequence, Event{Name: string(rune('A' + i)), Seed: uint32(i)})
	}
	guilty := []string{"D", "X"}
	played := 0
	fails := func(some []Event) bool {
		played++
		return slices.Contains(names(some), "D") && slices.Contains(names(some), "X")
	}
	if got := names(Shrink(sequence, 1000, fails)); !cmp.Equal(got, guilty) {
		t.Errorf("shrunk to %v in %d games", got, played)
	}
	played = 0
	short := Shrink(sequence, 5, fails)
	if played > 5 || !fails(short) {
		t.Errorf("%d games, %v", played, names(short))
	}
}

// TestJudge: an excuse covers its fault and its After, of which only time counts in which nothing
// hinders the agent.
func TestJudge(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	edit := Span{Event: Event{Name: "edit"}, Begin: at(10), End: at(10),
		Excuses: []Excuse{{Kind: Escaped, After: 2 * time.Second}}}
	stopped := Span{Event: Event{Name: "agent-stop"}, Begin: at(11), End: at(15), Hinders: true,
		Recovery: time.Second}
	waits := edit
	waits.Excuses = []Excuse{{Kind: Escaped, After: 2 * time.Second, Envoy: true}}
	killed := Span{Event: Event{Name: "envoy-kill"}, Begin: at(11), End: at(15), EnvoyAway: true}
	cuts := edit
	cuts.Excuses = []Excuse{{Kind: Cut, After: time.Second, Hindered: true}}
	gone := Span{Event: Event{Name: "agent-kill"}, Begin: at(9), End: at(9.5), Hinders: true,
		Recovery: time.Second}
	six := edit
	six.Excuses = []Excuse{{Kind: Escaped, Family: IPv6, After: 2 * time.Second, Only: []string{"x"}}}
	for _, c := range []struct {
		name    string
		o       Observation
		spans   []Span
		excused bool
	}{
		{"nothing happened", Observation{Kind: Escaped, From: at(10), To: at(11)}, nil, false},
		{"at once", Observation{Kind: Escaped, From: at(10.1), To: at(10.2)}, []Span{edit}, true},
		{"began before", Observation{Kind: Escaped, From: at(9), To: at(10.2)}, []Span{edit}, true},
		{"was over before", Observation{Kind: Escaped, From: at(9), To: at(9.9)}, []Span{edit}, false},
		{"too late", Observation{Kind: Escaped, From: at(12.1), To: at(12.2)}, []Span{edit}, false},
		{"another kind", Observation{Kind: Cut, From: at(10.1), To: at(10.2)}, []Span{edit}, false},
		{"hindered", Observation{Kind: Escaped, From: at(16.9), To: at(17)}, []Span{edit, stopped}, true},
		{"hindered and late", Observation{Kind: Escaped, From: at(17.1), To: at(18)},
			[]Span{edit, stopped}, false},
		{"still hindered", Observation{Kind: Escaped, From: at(90), To: at(91)},
			[]Span{edit, {Event: Event{Name: "agent-stop"}, Begin: at(11), Hinders: true}}, true},
		{"Envoy is no hindrance", Observation{Kind: Escaped, From: at(15), To: at(15.1)},
			[]Span{edit, killed}, false},
		{"waits for Envoy", Observation{Kind: Escaped, From: at(18.9), To: at(19)},
			[]Span{waits, killed}, true},
		{"waited for Envoy", Observation{Kind: Escaped, From: at(19.1), To: at(19.2)},
			[]Span{waits, killed}, false},
		{"while nobody held", Observation{Kind: Cut, From: at(10), To: at(10.3)}, []Span{cuts, gone}, true},
		{"while somebody held", Observation{Kind: Cut, From: at(10), To: at(10.3)},
			[]Span{cuts, {Event: gone.Event, Begin: at(5), End: at(6), Hinders: true}}, false},
		{"other family", Observation{Kind: Escaped, Family: IPv4, From: at(10.1), To: at(10.2), What: "x"},
			[]Span{six}, false},
		{"its family", Observation{Kind: Escaped, Family: IPv6, From: at(10.1), To: at(10.2), What: "x"},
			[]Span{six}, true},
		{"another thing", Observation{Kind: Escaped, Family: IPv6, From: at(10.1), To: at(10.2), What: "y"},
			[]Span{six}, false},
		{"within its grace", Observation{Kind: Silent, From: at(10), To: at(14.9), Grace: 5 * time.Second},
			nil, true},
		{"beyond its grace", Observation{Kind: Silent, From: at(10), To: at(15.1), Grace: 5 * time.Second},
			nil, false},
		{"grace and hindered", Observation{Kind: Silent, From: at(10), To: at(19.9), Grace: 5 * time.Second},
			[]Span{stopped}, true},
		{"grace, hindered and too long", Observation{Kind: Silent, From: at(10), To: at(20.1),
			Grace: 5 * time.Second}, []Span{stopped}, false},
	} {
		got := Judge([]Observation{c.o}, c.spans, at(100))
		if (len(got) == 0) != c.excused {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// TestFaults: names are unique and can be written; the times make sense.
func TestFaults(t *testing.T) {
	for _, backend := range []string{"nft", "legacy"} {
		seen := map[string]bool{}
		for _, f := range Faults(Setting{Backend: backend, DNS: true, All: true}) {
			if _, err := Parse(Format([]Event{{Name: f.Name}})); err != nil || seen[f.Name] {
				t.Errorf("%q: twice, or no name: %v", f.Name, err)
			}
			seen[f.Name] = true
			if f.Weight <= 0 || f.Shortest > f.Longest || f.Begin == nil {
				t.Errorf("%+v", f)
			}
		}
	}
}
