package envoywatch

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// sick are the clusters of a View in short: "a 1/3!" panics.
func sick(v View) string {
	var all []string
	for _, c := range v.Clusters {
		one := fmt.Sprintf("%s %d/%d", c.Name, c.Healthy, c.Total)
		if c.Panic {
			one += "!"
		}
		all = append(all, one)
	}
	return strings.Join(all, ", ")
}

// seconds lets so many pass, a Step each, and returns the last View.
func (t *test) seconds(n int) (v View) {
	t.Helper()
	for range n {
		v = t.after(time.Second)
	}
	return v
}

// count is how often one was asked since the last time.
func (t *test) count(question string) (n int) {
	for _, q := range t.asked {
		if q == question {
			n++
		}
	}
	t.asked = nil
	return n
}

// TestClusters: endpoints that two answers found sick are told within half a minute, and as soon as
// they are well no longer.
func TestClusters(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.clusters = []envoyadmin.ClusterHealth{{Name: "well", Total: 2, Healthy: 2},
		{Name: "z", Total: 3, Healthy: 2}, {Name: "a", Total: 5, Healthy: 4}, {Name: "none"}}
	if v := w.seconds(19); sick(v) != "" || w.count("clusters") != 0 {
		t.Errorf("at once it tells %q", sick(v))
	}
	if v := w.seconds(6); sick(v) != "" {
		t.Errorf("one answer tells %q", sick(v))
	}
	if v := w.seconds(5); sick(v) != "a 4/5, z 2/3" {
		t.Errorf("it tells %q", sick(v))
	}
	if n := w.count("panics"); n != 0 {
		t.Errorf("asked for panics %d times, where most are healthy", n)
	}
	w.clusters[1].Healthy, w.clusters[2].Healthy = 1, 5
	if v := w.seconds(20); sick(v) != "z 1/3" {
		t.Errorf("it tells %q", sick(v))
	}
	// One that is new is asked for again soon, and the counts of the other are the newest.
	w.clusters[0].Healthy = 1
	w.seconds(20)
	if v := w.seconds(5); sick(v) != "well 1/2, z 1/3" {
		t.Errorf("it tells %q", sick(v))
	}
	w.clusters = nil
	if v := w.seconds(20); sick(v) != "" {
		t.Errorf("it tells %q", sick(v))
	}
	w.count("")
	w.seconds(60)
	if n := w.count("clusters"); n != 3 {
		t.Errorf("asked %d times in a minute", n)
	}
}

// TestPanic: a cluster panics once Envoy has counted more of it between two answers, until enough
// endpoints are healthy.
func TestPanic(t *testing.T) {
	e := running()
	w := watch(t, e)
	w.step()
	w.clusters = []envoyadmin.ClusterHealth{{Name: "a:b", Total: 4, Healthy: 1},
		{Name: "c", Total: 4, Healthy: 1}}
	w.panics = map[string]uint64{"a_b": 7, "c": 2} // from another day
	if v := w.seconds(30); sick(v) != "a:b 1/4, c 1/4" {
		t.Errorf("it tells %q", sick(v))
	}
	w.panics["a_b"]++
	if v := w.seconds(20); sick(v) != "a:b 1/4!, c 1/4" {
		t.Errorf("it tells %q", sick(v))
	}
	if v := w.seconds(60); sick(v) != "a:b 1/4!, c 1/4" { // there is no traffic
		t.Errorf("it tells %q", sick(v))
	}
	w.clusters[0].Healthy = 3
	if v := w.seconds(20); sick(v) != "a:b 3/4, c 1/4" {
		t.Errorf("it tells %q", sick(v))
	}
	w.fails["panics"] = envoyadmin.ErrForbiddenPath
	w.panics["c"]++
	if v := w.seconds(20); sick(v) != "a:b 3/4, c 1/4" || v.Err != nil {
		t.Errorf("it tells %q, %v", sick(v), v.Err)
	}
	w.clusters[1].Healthy = 4
	w.seconds(20)
	w.count("")
	w.seconds(60)
	if n := w.count("panics"); n != 0 {
		t.Errorf("asked for panics %d times, where most are healthy", n)
	}
}

// TestClustersOfAnother: what was told of a process is not told of the next, nor of one that is
// gone.
func TestClustersOfAnother(t *testing.T) {
	told := func() *test {
		w := watch(t, running())
		w.step()
		w.clusters = []envoyadmin.ClusterHealth{{Name: "a", Total: 4, Healthy: 1}}
		if v := w.seconds(30); sick(v) != "a 1/4" || v.Started == nil {
			t.Fatalf("it tells %q, started with %v", sick(v), v.Started)
		}
		return w
	}
	w := told()
	w.restart()
	if v := w.after(time.Second); sick(v) != "" || v.Started != nil {
		t.Errorf("of the next it tells %q", sick(v))
	}
	w = told()
	w.down = envoyadmin.ErrRefused
	if v := w.after(time.Second); sick(v) != "" || v.Started != nil {
		t.Errorf("of one that is gone it tells %q", sick(v))
	}
	w.count("")
	w.seconds(60)
	if n := w.count("clusters"); n != 0 {
		t.Errorf("one that is gone was asked %d times", n)
	}
	w.down = nil // it was only a connection
	if v := w.seconds(30); sick(v) != "a 1/4" {
		t.Errorf("it tells %q", sick(v))
	}
	w.fails["clusters"] = &envoyadmin.StatusError{Code: 403}
	w.count("")
	v := w.seconds(60)
	if sick(v) != "" || v.Err != nil {
		t.Errorf("without an answer it tells %q, %v", sick(v), v.Err)
	}
	if n := w.count("clusters"); n != 3 {
		t.Errorf("asked %d times in a minute", n)
	}
}

// TestClustersWaited: an answer that waited for an Envoy which was busy with its own updates does
// not put the next off.
func TestClustersWaited(t *testing.T) {
	w := watch(t, running())
	w.takes["clusters"] = time.Second / 2
	w.seconds(30)
	w.count("")
	for w.takes["clusters"] = 16 * time.Second; w.count("clusters") == 0; {
		w.seconds(1)
	}
	began := w.clock
	for w.takes["clusters"] = time.Second / 2; w.count("clusters") == 0; {
		w.seconds(1)
	}
	if later := w.clock.Sub(began); later > 11*time.Minute {
		t.Errorf("asked again after %v", later)
	}
}

// TestAsideCost: what a large configuration makes dear is asked for rarely, and within five minutes
// all the same.
func TestAsideCost(t *testing.T) {
	for _, tt := range []struct{ takes, every time.Duration }{
		{0, 20 * time.Second}, {40 * time.Millisecond, 40 * time.Second},
		{500 * time.Millisecond, 500 * time.Second}, {2 * time.Second, 10 * time.Minute},
		{8 * time.Second, 800 * time.Second},
	} {
		if every := pace(tt.takes, clustersEvery, clustersShare); every != tt.every {
			t.Errorf("what takes %v: each %v, want %v", tt.takes, every, tt.every)
		}
	}
	w := watch(t, running())
	for _, question := range []string{"clusters", "panics", "bootstrap"} {
		w.takes[question] = 500 * time.Millisecond // measured, at 10,000 services
	}
	w.step()
	w.clusters = []envoyadmin.ClusterHealth{{Name: "a", Total: 4, Healthy: 1}}
	w.panics = map[string]uint64{}
	began := w.clock
	for {
		w.panics["a"]++
		v := w.after(time.Second)
		if took := w.clock.Sub(began); took > 5*time.Minute {
			t.Fatalf("after %v it tells %q", took, sick(v))
		}
		if sick(v) == "a 1/4!" {
			break
		}
	}
	w.count("")
	began = w.clock
	w.seconds(3600)
	asked := map[string]int{}
	for _, q := range w.asked {
		asked[q]++
	}
	hour := w.clock.Sub(began)
	for _, question := range []string{"clusters", "panics"} {
		share := float64(asked[question]) * 0.5 / hour.Seconds()
		if share > 0.0041 || asked[question] < 15 {
			t.Errorf("%s: %d times in an hour, %.2f %%", question, asked[question], 100*share)
		}
	}
	if asked["bootstrap"] != 0 {
		t.Error("asked again what it was started with")
	}

	// Without an answer for 20 s, the time limit, it is asked each ten minutes at most.
	w.takes["clusters"], w.fails["clusters"] = 20*time.Second, envoyadmin.ErrTimeout
	w.seconds(240)
	w.count("")
	w.seconds(3600)
	if n := w.count("clusters"); n < 5 || n > 6 {
		t.Errorf("asked %d times in an hour, in vain", n)
	}
}

// TestStarted: what Envoy was started with is asked for until it tells.
func TestStarted(t *testing.T) {
	w := watch(t, running())
	w.fails["bootstrap"] = &envoyadmin.StatusError{Code: 403}
	w.step()
	if v := w.seconds(60); v.Started != nil || v.Err != nil || w.count("bootstrap") != 1 {
		t.Errorf("started with %v, %v", v.Started, v.Err)
	}
	maps.DeleteFunc(w.fails, func(string, error) bool { return true })
	if v := w.seconds(60); v.Started == nil || v.Started.Targets[0].Address != "td:443" ||
		w.count("bootstrap") != 1 {
		t.Errorf("started with %v", v.Started)
	}
}

// TestClustersAndHints: what the log tells while the clusters are asked for is followed at once.
func TestClustersAndHints(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.seconds(21)
	w.clusters = []envoyadmin.ClusterHealth{{Name: "a", Total: 4, Healthy: 1}}
	w.while["clusters"] = func() {
		w.set(func() { w.sets++ })
		w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Listener: "a", Count: 1})
	}
	for w.while["clusters"] != nil {
		w.asked = nil
		w.clock = w.clock.Add(time.Second)
		if _, wait := w.step(); w.while["clusters"] == nil && wait != 0 {
			t.Errorf("it waits %v", wait)
		}
	}
	if asked := w.questions(); !strings.HasSuffix(asked, "clusters") {
		t.Errorf("asked on: %s", asked)
	}
	if v, _ := w.step(); v.Generation != 2 {
		t.Errorf("generation %d", v.Generation)
	}
}
