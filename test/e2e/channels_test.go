//go:build lab

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// channelFault is what befalls channels.
type channelFault struct {
	name   string
	http   platform.Fault             // of guest attributes and Cloud Logging
	serial func(s *mesh.Serial) error // nil: it has no such fault
	passes bool                       // what is told gets through, late
}

var channelFaults = []channelFault{
	{"hang", platform.Fault{Hang: true}, (*mesh.Serial).Hang, false},
	{"refuse for good", platform.Fault{Status: http.StatusBadRequest, Body: "{}"},
		(*mesh.Serial).Refuse, false},
	{"refuse", platform.Fault{Status: http.StatusServiceUnavailable}, (*mesh.Serial).Refuse, false},
	{"are slow", platform.Fault{Delay: 4 * time.Second},
		func(s *mesh.Serial) error { return s.Slow(200) }, true},
	// Nobody reads anything from the serial port.
	{"answer nonsense", platform.Fault{Status: http.StatusOK, Body: "<html>Sign in",
		Header: map[string]string{"Content-Type": "text/html", "X-Long": strings.Repeat("x", 50_000)}},
		nil, false},
}

var channelPrefix = map[string]string{
	"guest_attributes": "/computeMetadata/v1/instance/guest-attributes/",
	"cloud_logging":    "/v2/entries:write",
}

var allChannels = []string{"cloud_logging", "guest_attributes", "serial"}

// TestChannels: while channels hang, refuse, are slow or answer nonsense, the passes go on and take
// no longer, and the memory is bounded. When it is over they recover by themselves, and as many
// lines and entries arrived, or are said to be dropped, as were told.
//
// make soak has each kind of it befall each channel alone, and all together, for a minute. Here
// there is time for two kinds, and all together. (internal/report's test of this name has ten
// minutes of emulated time for the rates.)
func TestChannels(t *testing.T) {
	beside(t)
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	c := &channelTrial{m: m, a: m.NewAgent()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", c.a.Log())
		}
		must(t, m.Close())
	})
	if os.Getenv("SOAK") == "" {
		// From the start: it is the beginning that has a budget for three attributes.
		mend := c.befall(t, channelFaults[0], allChannels)
		must(t, c.a.Start())
		must(t, c.a.WaitReady(within(t, 20*time.Second)))
		c.measure(t, "all hang", 0, 40) // more than the serial port's queue holds
		c.stuck(t, channelFaults[0], allChannels)
		mend()
		c.recovered(t, allChannels)
		c.measure(t, healthy, 0, 5)
		mend = c.befall(t, channelFaults[1], allChannels)
		c.measure(t, "all refuse for good", 0, 5)
		eventually(t, 10*time.Second, "entries dropped", func() (bool, string) {
			return scrape(t, c.a).channel("dropped_total", "cloud_logging") > 0, ""
		})
		c.stuck(t, channelFaults[1], allChannels)
		mend()
		c.recovered(t, allChannels)
	} else {
		must(t, c.a.Start())
		must(t, c.a.WaitReady(within(t, 20*time.Second)))
		c.soak(t)
	}
	c.table(t)
	c.account(t)
}

// soak measures each fault of each channel, and of all, for a minute. At last more is told than
// fits into the memory that is for it.
func (c *channelTrial) soak(t *testing.T) {
	const minute = time.Minute
	for _, f := range channelFaults {
		c.measure(t, healthy, minute, 5) // each time: a machine is not as quiet all the time
		for _, which := range [][]string{allChannels[:1], allChannels[1:2], allChannels[2:],
			allChannels} {
			if f.serial == nil && which[0] == "serial" {
				continue
			}
			mend := c.befall(t, f, which)
			c.measure(t, strings.Join(which, ", ")+" "+f.name, minute, 5)
			c.stuck(t, f, which)
			mend()
			c.recovered(t, which)
		}
	}
	mend := c.befall(t, channelFaults[0], allChannels)
	c.measure(t, "all hang in a flood", minute, 40)
	mend()
	c.recovered(t, allChannels)
	c.measure(t, healthy, minute, 5)
}

// channelTrial is a mesh whose channels are disturbed.
type channelTrial struct {
	m        *mesh.Mesh
	a        *mesh.Agent
	services int // that came
	rows     []channelRow
	before   series // the channels' faults
}

const healthy = "healthy"

// channelRow is what was measured while something lasted.
type channelRow struct {
	name      string
	passes    float64
	mean, p99 float64    // seconds; p99 is the bound of its bucket
	memory    float64    // MiB
	dropped   [2]float64 // of the serial port, of Cloud Logging
}

func (r channelRow) isHealthy() bool { return r.name == healthy }

// series are those of a scrape.
type series map[string]float64

func scrape(t *testing.T, a *mesh.Agent) series {
	t.Helper()
	code, body, err := a.Get("/metrics")
	if err != nil || code != http.StatusOK {
		t.Fatalf("/metrics: %d %v", code, err)
	}
	s := series{}
	for line := range strings.Lines(body) {
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			n, err := strconv.ParseFloat(strings.TrimSpace(line[i:]), 64)
			must(t, err)
			s[strings.TrimPrefix(line[:i], report.Prefix)] = n
		}
	}
	return s
}

func (s series) channel(name, channel string) float64 {
	return s[fmt.Sprintf("channel_%s{channel=%q}", name, channel)]
}

// befall begins a fault.
func (c *channelTrial) befall(t *testing.T, f channelFault, which []string) (mend func()) {
	t.Helper()
	var ends []func()
	for _, channel := range which {
		fault := f.http
		fault.Prefix = channelPrefix[channel]
		switch {
		case channel != "serial":
			ends = append(ends, c.m.Platform.Inject(fault))
		case f.serial != nil:
			must(t, f.serial(c.m.Serial))
			ends = append(ends, func() { must(t, c.m.Serial.Mend()) })
		}
	}
	return func() {
		for _, end := range ends {
			end()
		}
	}
}

// measure has much to tell for at least so long, and measures: each round a service comes that must
// be in the rules at once, and so many listeners are rejected, and mended again.
func (c *channelTrial) measure(t *testing.T, name string, atLeast time.Duration, rejected int) {
	t.Helper()
	c.before = scrape(t, c.a)
	for began := time.Now(); ; {
		round := time.Now()
		c.services++
		with := services(service(c.services))
		without := with
		for i := range rejected {
			with.Listeners = append(with.Listeners, controlplane.RefusedListener(
				fmt.Sprintf("bad-%d", i), uint16(16_000+i), "/root/access.log"))
		}
		for _, config := range []controlplane.Config{with, without} {
			_, err := c.m.CP.Set(config)
			must(t, err)
			_, err = c.a.Wait(within(t, 20*time.Second), "what Envoy rejects", func(s status.Status) bool {
				n := 0
				for _, f := range s.Findings {
					if f.ID == symptom.AccessLogUnwritable {
						n++
					}
				}
				return n == min(len(config.Listeners), 33) // 32, and one that tells of the others
			})
			must(t, err)
		}
		eventually(t, 10*time.Second, "the service that came while channels "+name,
			func() (bool, string) {
				out := chains(t, c.m)
				return strings.Contains(out, "-d "+service(c.services).Prefixes[0].String()), out
			})
		if code, body, err := c.a.Get("/healthz"); code != http.StatusOK {
			t.Errorf("%s: /healthz: %d %q %v", name, code, body, err)
		}
		if time.Since(began) >= atLeast {
			break
		}
		time.Sleep(time.Until(round.Add(4 * time.Second))) // within the rate of Cloud Logging
	}
	now := scrape(t, c.a)
	diff := func(name string) float64 { return now[name] - c.before[name] }
	row := channelRow{name: name, passes: diff("pass_duration_seconds_count"),
		memory: now["process_resident_memory_bytes"] / (1 << 20)}
	for i, channel := range []string{"serial", "cloud_logging"} {
		row.dropped[i] = now.channel("dropped_total", channel) -
			c.before.channel("dropped_total", channel)
	}
	row.mean = diff("pass_duration_seconds_sum") / row.passes
	for _, le := range []float64{60, 30, 10, 5, 2.5, 1, .5, .25, .1, .05, .025, .01, .005, .0025,
		.001} {
		if diff(fmt.Sprintf("pass_duration_seconds_bucket{le=\"%v\"}", le)) >= .99*row.passes {
			row.p99 = le
		}
	}
	c.rows = append(c.rows, row)
}

// stuck fails where something got through a channel that takes nothing.
func (c *channelTrial) stuck(t *testing.T, f channelFault, which []string) {
	t.Helper()
	now := scrape(t, c.a)
	for _, channel := range which {
		if f.passes || channel == "serial" && f.serial == nil ||
			channel == "guest_attributes" && f.http.Status == http.StatusOK { // an answer is not read
			continue
		}
		if n := now.channel("writes_total", channel) -
			c.before.channel("writes_total", channel); n != 0 {
			t.Errorf("%v writes to %s, which %s", n, channel, f.name)
		}
	}
}

// recovered waits until all of them are well again.
func (c *channelTrial) recovered(t *testing.T, which []string) {
	t.Helper()
	began := time.Now()
	for _, channel := range which {
		eventually(t, 100*time.Second, channel+" well again", func() (bool, string) {
			s := scrape(t, c.a)
			return s.channel("up", channel) == 1 && s.channel("writes_total", channel) > 0, c.a.Log()
		})
	}
	t.Logf("%s: well again %v after", c.rows[len(c.rows)-1].name,
		time.Since(began).Round(time.Second/10))
}

// table prints what was measured, and compares it with the healthy rows.
func (c *channelTrial) table(t *testing.T) {
	t.Helper()
	var text strings.Builder
	fmt.Fprintf(&text, "%-45s %6s %10s %10s %9s  dropped: lines, entries\n", "channels", "passes",
		"mean", "p99 below", "memory")
	for _, r := range c.rows {
		fmt.Fprintf(&text, "%-45s %6.0f %7.2f ms %7.1f ms %5.1f MiB %15.0f, %.0f\n", r.name, r.passes,
			1000*r.mean, 1000*r.p99, r.memory, r.dropped[0], r.dropped[1])
	}
	t.Log("\n" + text.String())
	well := channelRow{memory: c.rows[slices.IndexFunc(c.rows, channelRow.isHealthy)].memory}
	for _, r := range c.rows {
		if r.isHealthy() { // what the machine makes of it at its worst
			well.mean, well.p99 = max(well.mean, r.mean), max(well.p99, r.p99)
		}
	}
	for _, r := range c.rows {
		if r.memory > well.memory+16 {
			t.Errorf("%s: %.1f MiB of memory, healthy %.1f", r.name, r.memory, well.memory)
		}
		if strings.Contains(r.name, "flood") {
			continue // its passes have more to do
		}
		if r.mean > 1.5*well.mean || r.p99 > 2.5*well.p99 { // the next bucket
			tooDear(t, "%s: a pass takes %.2f ms, p99 below %.1f ms; healthy %.2f, %.1f", r.name,
				1000*r.mean, 1000*r.p99, 1000*well.mean, 1000*well.p99)
		}
	}
}

var saidDropped = regexp.MustCompile(`^WARNING (\d+) (lines|entries) dropped: `)

// account: what arrived is what is counted, in the order in which it happened; as many are said to
// be dropped as are; and both channels were told the same.
func (c *channelTrial) account(t *testing.T) {
	t.Helper()
	all := func(channel string) []string {
		if channel == "serial" {
			return lines(c.m.Platform.Serial())
		}
		return told(c.m.Platform.LogEntries())
	}
	events := map[string]int{}
	for _, channel := range []string{"serial", "cloud_logging"} {
		said, arrived := 0, []string{}
		eventually(t, 3*time.Minute, channel+" at rest, and as it counts", func() (bool, string) {
			said, arrived = 0, nil
			for _, line := range all(channel) {
				if part := saidDropped.FindStringSubmatch(line); part != nil {
					n, err := strconv.Atoi(part[1])
					must(t, err)
					said += n
					continue
				}
				arrived = append(arrived, line)
			}
			s := scrape(t, c.a)
			events[channel] = len(arrived) + said
			return int(s.channel("dropped_total", channel)) == said &&
					int(s.channel("writes_total", channel)) == len(all(channel)) &&
					(channel == "serial" || events[channel] == events["serial"]),
				fmt.Sprintf("%d arrived, %d said to be dropped, of %d; counted: %v written, %v dropped",
					len(arrived), said, events["serial"], s.channel("writes_total", channel),
					s.channel("dropped_total", channel))
		})
		t.Logf("%s: %d events arrived, %d are said to be dropped", channel, len(arrived), said)
		// Over many minutes the agent itself says less than the serial port's queue holds.
		if said == 0 && (channel != "serial" || os.Getenv("SOAK") == "") {
			t.Errorf("%s: nothing was dropped", channel)
		}
		log, last := c.a.Log(), ""
		for _, line := range arrived {
			_, message, _ := strings.Cut(line, " ")
			_, rest, found := strings.Cut(log, "\t"+message)
			if !found && !strings.HasPrefix(message, "service-proxy-agent ") { // the log says it in fields
				t.Errorf("%s: %q, after %q, is not in the log, or was told before", channel, message, last)
				break
			}
			if found {
				log, last = rest, message
			}
		}
	}
}
