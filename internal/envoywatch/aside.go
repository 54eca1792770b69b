package envoywatch

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// What is asked beside the listeners, each rarely: how the endpoints are, and what Envoy was
// started with. At 10,000 services each costs its main thread half a second.

const (
	// asideFirst is when the first of these questions comes to a process that was just met: it has
	// better things to do until then, and its endpoints are still being checked.
	asideFirst = 20 * time.Second
	// clustersEvery is how often a small Envoy is asked for the health of its endpoints.
	clustersEvery = 20 * time.Second
	// clustersAgain is the same where the last answer has endpoints that were healthy before.
	clustersAgain = 5 * time.Second
	// clustersShare: an answer that cost 1 is followed by 1,000 without, at most clustersLate, but no
	// fewer than clustersLeast. While some endpoints are not healthy it is sickShare, and behind the
	// first answer that says so clustersLeast, so as to know soon whether it stays.
	clustersShare = 1000
	sickShare     = 250
	clustersLate  = 10 * time.Minute
	clustersLeast = 100
	// clustersFailed is the most that is waited where there was no usable answer.
	clustersFailed = 10 * time.Minute
	// startedAgain is how soon it is asked again what Envoy was started with, without an answer.
	startedAgain = time.Minute
)

// Aside is what is asked of Envoy beside the listeners.
type Aside struct {
	// Clusters are those with endpoints that are not healthy, by name; nil: none, or not known.
	Clusters []symptom.Cluster
	// Started is what the process was started with; nil: not known.
	Started *envoyadmin.Bootstrap
}

// aside is that of one process, with when to ask for it. The zero value asks at once.
type aside struct {
	Aside
	startedNext time.Time
	health      health
}

// asideAfter is that of a process which was met at this time.
func asideAfter(met time.Time) aside {
	first := met.Add(asideFirst)
	return aside{startedNext: first, health: health{next: first}}
}

// health is when to ask how the endpoints are, and what to make of the answers. It is pure: the
// time is given to it.
//
//	h.due(now)                 is it time to ask for the clusters?
//	h.answered(…, clusters)    their answer; does it tell, and shall panics be asked for?
//	h.panicked(…, counts)      the answer to that
//	h.told()                   the clusters that are told
type health struct {
	next       time.Time
	panicsNext time.Time
	// unhealthy are the clusters with endpoints that are not, of the last answer, by name; true: and
	// of the one before, so that they are told. Endpoints that have just come are not healthy until
	// they were checked.
	unhealthy map[string]bool
	clusters  []envoyadmin.ClusterHealth // those of unhealthy, by name
	panics    map[string]uint64          // by cluster; nil: not asked yet
	panicking map[string]bool            // the count moved while few were healthy
}

func (h *health) due(now time.Time) bool { return !now.Before(h.next) }

// pace is how long after an answer that cost so much the next may come.
func pace(cost, floor, share time.Duration) time.Duration {
	return max(floor, min(share*cost, clustersLate), clustersLeast*cost)
}

// answered takes the clusters.
func (h *health) answered(
	ended time.Time, cost time.Duration, all []envoyadmin.ClusterHealth) {
	was := h.unhealthy
	h.unhealthy, h.clusters = map[string]bool{}, nil
	fresh := false
	for _, c := range all {
		if c.Healthy >= c.Total {
			continue
		}
		if _, seen := h.unhealthy[c.Name]; seen {
			continue
		}
		_, again := was[c.Name]
		h.unhealthy[c.Name] = again
		h.clusters = append(h.clusters, c)
		fresh = fresh || !again
	}
	slices.SortFunc(h.clusters, func(a, b envoyadmin.ClusterHealth) int {
		return strings.Compare(a.Name, b.Name)
	})
	few := map[string]bool{}
	for _, c := range h.clusters {
		if c.FewHealthy() && h.panicking[c.Name] {
			few[c.Name] = true
		}
	}
	h.panicking = few
	switch {
	case fresh:
		h.next = ended.Add(pace(cost, clustersAgain, clustersLeast))
	case len(h.clusters) > 0:
		h.next = ended.Add(pace(cost, clustersEvery, sickShare))
	default:
		h.next = ended.Add(pace(cost, clustersEvery, clustersShare))
	}
}

// failed is answered where there was no usable answer: nothing is known then.
func (h *health) failed(ended time.Time, waited time.Duration) {
	*h = health{panicsNext: h.panicsNext, panics: h.panics,
		next: ended.Add(max(clustersEvery, min(sickShare*waited, clustersFailed)))}
}

// panicsDue says whether it is to be asked if Envoy ignores the health of a cluster.
func (h *health) panicsDue(now time.Time) bool {
	return !now.Before(h.panicsNext) &&
		slices.ContainsFunc(h.clusters, envoyadmin.ClusterHealth.FewHealthy)
}

// panicked takes the counts; nil: there was no usable answer. A cluster that ignored the health
// once is told so until more of its endpoints are healthy: whether there was traffic between two
// answers says nothing about them.
func (h *health) panicked(
	ended time.Time, cost time.Duration, counts map[string]uint64) {
	h.panicsNext = ended.Add(pace(cost, clustersEvery, sickShare))
	if counts == nil {
		return
	}
	for _, c := range h.clusters {
		// Envoy writes a colon of a cluster's name as an underscore in those of its statistics.
		name := strings.ReplaceAll(c.Name, ":", "_")
		if h.panics != nil && c.FewHealthy() && counts[name] > h.panics[name] {
			h.panicking[c.Name] = true
		}
	}
	h.panics = counts
}

// told are the clusters that two answers in a row found with endpoints that are not healthy.
func (h *health) told() (all []symptom.Cluster) {
	for _, c := range h.clusters {
		if h.unhealthy[c.Name] {
			all = append(all, symptom.Cluster{ClusterHealth: c, Panic: h.panicking[c.Name]})
		}
	}
	return all
}

// askAside asks one of these questions, where one is due.
func (w *Watch) askAside(ctx context.Context) {
	p := &w.process
	if w.outage.Err != nil || p.id == 0 || p.state != live {
		return
	}
	now := w.o.Now()
	switch {
	case p.aside.Started == nil && !now.Before(p.aside.startedNext):
		w.askStarted(ctx)
	case p.aside.health.due(now):
		w.askClusters(ctx)
	}
}

// askStarted asks what Envoy was started with.
func (w *Watch) askStarted(ctx context.Context) {
	var b *envoyadmin.Bootstrap
	cost, err := w.spend(envoyadmin.BootstrapQuestion, func() (err error) {
		b, err = w.o.Admin.Bootstrap(ctx)
		return err
	})
	w.process.aside.startedNext = w.o.Now().Add(pace(cost, startedAgain, sickShare))
	if err == nil {
		w.process.aside.Started = b
	}
}

// askClusters asks how the endpoints are, and where few are healthy, whether Envoy ignores it.
func (w *Watch) askClusters(ctx context.Context) {
	h := &w.process.aside.health
	var all []envoyadmin.ClusterHealth
	cost, err := w.spend(envoyadmin.ClustersQuestion, func() (err error) {
		all, err = w.o.Admin.Clusters(ctx)
		return err
	})
	if errors.Is(err, context.Canceled) {
		return
	}
	if err != nil {
		h.failed(w.o.Now(), cost)
	} else {
		h.answered(w.o.Now(), cost, all)
	}
	if h.panicsDue(w.o.Now()) && !w.heard {
		var counts map[string]uint64
		cost, _ := w.spend(envoyadmin.StatsQuestion, func() (err error) {
			counts, err = w.o.Admin.Panics(ctx)
			return err
		})
		h.panicked(w.o.Now(), cost, counts)
	}
	w.process.aside.Clusters = h.told()
}
