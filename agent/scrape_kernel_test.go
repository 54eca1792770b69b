//go:build kernel

package agent

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// BenchmarkScrape is how long a pass takes that puts a change into the kernel, with 50 scrapes a
// second and without, and the number of series. Both kinds of pass take turns, a few at a time:
// what else a machine does then falls on both. Who scrapes has the answer packed, as Prometheus
// does, and only counts its bytes: Prometheus is on another machine.
func BenchmarkScrape(b *testing.B) {
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		for _, n := range []int{10, 10_000} {
			b.Run(fmt.Sprintf("%s/services=%d", backend, n), func(b *testing.B) {
				turns, each := 20, 20
				if n > 1000 {
					each = 5
				}
				if os.Getenv("BENCH_ONCE") != "" {
					turns, each = 2, 2
				}
				benchmarkScrape(b, backend, n, turns, each)
			})
		}
	}
}

func benchmarkScrape(b *testing.B, backend string, n, turns, each int) {
	var m *measured
	var passing sync.WaitGroup
	var took [2][]time.Duration // without and with scrapes
	ready, turn := make(chan bool), make(chan int)
	// The thread that passes has a network namespace of its own; who scrapes has not.
	passing.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		defer close(ready)
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			b.Error("needs root: it makes a network namespace: ", err)
			return
		}
		k, err := iptables.Open(b.Context(), iptables.Options{Backend: backend})
		if err != nil {
			b.Error(err)
			return
		}
		m = newMeasured(b, k)
		m.serve(n)
		m.settle(b)
		ready <- true
		for with := range turn {
			for range each {
				m.serve(n)
				began := time.Now()
				m.pass(b.Context(), began)
				took[with] = append(took[with], time.Since(began))
			}
			ready <- true
		}
	})
	if !<-ready {
		return
	}
	server := httptest.NewServer(m.metrics.Handler())
	defer server.Close()
	scraped := 0
	for i := range 2 * turns {
		with := i % 2
		turn <- with
		ticker := time.NewTicker(20 * time.Millisecond)
		for over := false; !over; {
			select {
			case over = <-ready:
			case <-ticker.C:
				if with == 0 {
					continue
				}
				if err := scrapePacked(server.Client(), server.URL); err != nil {
					b.Error(err)
				}
				scraped++
			}
		}
		ticker.Stop()
	}
	close(turn)
	passing.Wait()
	series, err := scrape(server.Client(), server.URL)
	if err != nil {
		b.Error(err)
	}
	quantile := func(d []time.Duration, percent int) time.Duration {
		return slices.Sorted(slices.Values(d))[len(d)*percent/100]
	}
	p99 := func(d []time.Duration) time.Duration { return quantile(d, 99) }
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ms(p99(took[0])), "p99-ms")
	b.ReportMetric(ms(p99(took[1])), "p99-scraped-ms")
	b.ReportMetric(float64(p99(took[1]))/float64(p99(took[0])), "p99-ratio(max1.1)")
	b.ReportMetric(float64(quantile(took[1], 50))/float64(quantile(took[0], 50)), "p50-ratio")
	b.ReportMetric(float64(scraped), "scrapes")
	b.ReportMetric(float64(series), "series")
}

// scrapePacked gets /metrics and looks at nothing of it.
func scrapePacked(client *http.Client, url string) error {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Header.Set("Accept-Encoding", "gzip")
	res, err := client.Do(request)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err = io.Copy(io.Discard, res.Body); err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	return err
}
