package result

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func recorded() Run {
	r := Run{Machine: "2 × Xeon, 8 GB", Kernel: "6.1.0", Date: "2026-11-29",
		Versions: map[string]string{"envoy": "1.40.0"}}
	r.Add(NFT, 10, Agent, PushP50, 19.5, 200)
	r.Add(NFT, 10, Floor, PushP50, 11, 200)
	r.Miss(Legacy, 10_000, Naive, PushP50, 600_000, "gave up after 10 min")
	return r
}

func TestWriteRead(t *testing.T) {
	name := filepath.Join(t.TempDir(), "new", "curve.json")
	want := recorded()
	if err := Write(name, want); err != nil {
		t.Fatal(err)
	}
	have, err := Read(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Error(diff)
	}
	p, there := have.Find(Legacy, 10_000, Naive, PushP50)
	if !there || p.Missing == "" || p.Unit != "ms" || p.Value != 600_000 {
		t.Errorf("%v %+v", there, p)
	}
	if _, there := have.Find(NFT, 10_000, Naive, PushP50); there {
		t.Error("found what is not there")
	}
	if diff := cmp.Diff([]int{10, 10_000}, have.Sizes()); diff != "" {
		t.Error(diff)
	}
}

func TestCheck(t *testing.T) {
	for name, spoil := range map[string]func(r *Run){
		`unknown metric "speed"`: func(r *Run) { r.Points[0].Metric = "speed" },
		`not in "s"`:             func(r *Run) { r.Points[0].Unit = "s" },
		`unknown backend ""`:     func(r *Run) { r.Points[0].Backend = "" },
		`unknown who "me"`:       func(r *Run) { r.Points[0].Who = "me" },
		"resident has no floor":  func(r *Run) { r.Add(NFT, 10, Floor, Resident, 1, 1) },
		"of 0 services":          func(r *Run) { r.Points[0].Services = 0 },
		"is NaN":                 func(r *Run) { r.Points[0].Value = math.NaN() },
		"is +Inf":                func(r *Run) { r.Points[0].Value = math.Inf(1) },
		"is -1":                  func(r *Run) { r.Points[0].Value = -1 },
		"is there twice":         func(r *Run) { r.Points = append(r.Points, r.Points[0]) },
	} {
		r := recorded()
		spoil(&r)
		file := filepath.Join(t.TempDir(), "curve.json")
		if err := Write(file, r); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q, have %v", name, err)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s: written nonetheless", name)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"unknown field":  `{"points": [{"vlaue": 1}]}`,
		"unknown metric": `{"points": [{"metric": "speed"}]}`,
		"unexpected EOF": `{"points": [`,
	} {
		file := filepath.Join(t.TempDir(), "curve.json")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(file); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q, have %v", name, err)
		}
	}
	if _, err := Read(filepath.Join(t.TempDir(), "none")); !os.IsNotExist(err) &&
		!strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}

func TestHere(t *testing.T) {
	// One o'clock at night in Paris is still the day before in UTC.
	paris := time.FixedZone("CET", 3600)
	r, err := Here(time.Date(2026, 11, 30, 0, 30, 0, 0, paris))
	if err != nil {
		t.Fatal(err)
	}
	if r.Date != "2026-11-29" || r.Kernel == "" || strings.HasPrefix(r.Machine, "0 ×") {
		t.Errorf("%+v", r)
	}
	have := machine("processor\t: 0\nmodel name\t: Intel(R)  Xeon(R)\n\nprocessor\t: 1\n"+
		"model name\t: Intel(R)  Xeon(R)\n", "MemTotal:        8152236 kB\n")
	if want := "2 × Intel(R) Xeon(R), 8 GB"; have != want {
		t.Errorf("%q, want %q", have, want)
	}
}

// TestMetrics: the names are the file's contract, and a floor says what it is.
func TestMetrics(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range Metrics {
		if m.Name == "" || m.Unit == "" || m.Title == "" || seen[m.Name] {
			t.Errorf("%+v", m)
		}
		seen[m.Name] = true
	}
}
