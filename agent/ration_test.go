package agent

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestFlappingEnvoy: an Envoy that comes and goes each second for an hour fills no channel, and in
// the end each tells how the VM stands.
func TestFlappingEnvoy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHour(t, 1, iptables.NFT)
		defer h.stop()
		var at []time.Time
		var last report.Event
		h.life.loop.told.reporters.events = func(e report.Event) { at, last = append(at, time.Now()), e }
		for second := range 3600 {
			if second%2 == 0 {
				h.startEnvoy(true)
			} else {
				h.envoy.stop()
			}
			h.run(time.Second)
		}
		n := len(at)
		if most := peak(at); n > 12*60+eventBurst || most > eventBurst+12 {
			t.Errorf("%d lines in an hour, %d in a minute", n, most)
		}
		h.startEnvoy(true)
		h.run(2 * time.Minute)
		if h.life.loop.told.ration.left != 0 || !strings.Contains(last.Message, "ready: nothing fails") {
			t.Errorf("at last: %+v", last)
		}
	})
}

// TestManyFailures: the log alone has each of a thousand, and the channels how many were left out.
func TestManyFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told, take := heard()
		p := intercepting()
		for i := range 1000 {
			p.findings = append(p.findings, symptom.Finding{ID: symptom.ListenerRejected,
				Severity: symptom.Error, Key: fmt.Sprint(i), Cause: fmt.Sprint("rejected ", i)})
		}
		told.publish(p, "nft")
		if n := strings.Count(take(), "rejected "); n > eventBurst+1 {
			t.Errorf("%d lines", n)
		}
		time.Sleep(togetherEach)
		told.publish(p, "nft")
		const want = " lines were left out here, the VM's log has them; now ready: rejected 0\n"
		if got := take(); !strings.Contains(got, want) {
			t.Errorf("a minute later:\n%s", got)
		}
	})
}

// BenchmarkManyFailures is a pass that finds what the one before found: Envoy has rejected all of
// 10,000 listeners, as where it cannot write their access log.
func BenchmarkManyFailures(b *testing.B) {
	told, take := heard()
	p := intercepting()
	for i := range 10000 {
		p.findings = append(p.findings, symptom.Finding{ID: symptom.AccessLogUnwritable,
			Severity: symptom.Error, Key: fmt.Sprint("listener-", i), Cause: "rejected"})
	}
	told.publish(p, "nft")
	for b.Loop() {
		told.publish(p, "nft")
		take()
	}
}
