package page

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

var update = flag.Bool("update", false, "write the golden files")

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// report is a doctor's of findings, each put where Examine would.
func report(found []symptom.Finding, unseen map[symptom.Source]string) doctor.Report {
	results := symptom.Examine(symptom.Facts{Unseen: unseen})
	for i := range results {
		r := &results[i]
		for _, f := range found {
			if f.ID == r.ID {
				r.State, r.Why, r.Severity = symptom.Found, "", max(f.Severity, r.Severity)
				r.Findings = append(r.Findings, f)
			}
		}
	}
	return doctor.New(results, doctor.Options{Version: "1.2.3", Time: noon, FailOn: symptom.Error,
		Unseen: unseen})
}

// samples are an hour in which a bit of everything happened.
func samples(n int) (all []status.Sample) {
	for i := range n {
		if i > n/2 && i < n/2+5 {
			continue // no agent
		}
		s := status.Sample{Time: noon.Add(time.Duration(i-n+1) * time.Minute), State: "ready", Passes: 4,
			SlowestPass: 0.004 + float64(i*7%11)*0.0008}
		if i%9 < 3 {
			s.SlowestChange, s.Changes = 0.012+float64(i*5%13)*0.002, 1+i%4
		}
		if i == 11 || i == n*2/3 {
			s.Repairs = 1
		}
		if i > n/2 && i < n/2+9 {
			s.State, s.SlowestPass = "bypass", 0
		}
		all = append(all, s)
	}
	return all
}

func healthy() Content {
	s := status.Status{
		Schema: status.Schema, Version: "1.2.3", Heartbeat: noon.Add(-3 * time.Second),
		Started: noon.Add(-50 * time.Hour), Mode: "intercepting", Ready: true,
		Since:     noon.Add(-95 * time.Minute),
		Bootstrap: status.Bootstrap{Status: "FINISHED", Done: true},
		Attribute: &status.Attribute{Read: noon.Add(-2 * time.Minute)},
		Envoy: status.Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Configured: true, Listeners: 7,
			Version: "5f1e0b6a0c4e9f2d/1.40.0/Clean/RELEASE/BoringSSL", Number: "1.40.0",
			Node: "projects/123456789/networks/mesh/nodes/2f0e8e9c-8c5e-4c0b-9f8e-5f2f6f8f9f0a"},
		ControlPlane: status.ControlPlane{Known: true, Connected: true, Since: noon.Add(-50 * time.Hour),
			Target: "trafficdirector.googleapis.com:443", Heard: noon.Add(-40 * time.Minute),
			Closed: &status.Close{Time: noon.Add(-51 * time.Hour), Code: 14,
				Message: "upstream connect error"}},
		Backend: "nft",
		Families: []status.Family{
			{Family: "IPv4", Usable: true, Equal: true, Jumps: true, Services: 6, ServicePorts: 1,
				OutboundPort: 15001, InboundPort: 15006, Rules: 27, Applied: noon.Add(-40 * time.Minute)},
			{Family: "IPv6", Usable: true, Equal: true, Jumps: true, Services: 2, ServicePorts: 1,
				OutboundPort: 15001, Rules: 19, Applied: noon.Add(-50 * time.Hour)}},
		ServingPorts: []uint16{8080}, Passes: 1203, Undone: 2, LastDriftBy: "iptables (4711)",
		LastDriftWhen: noon.Add(-20 * time.Minute),
		Services: []status.Service{
			{Name: "ads.mesh.example", Addresses: []string{"10.32.0.11:80"}},
			{Name: "cart.mesh.example", Addresses: []string{"10.32.0.12:80", "10.32.0.12:443", "[fd20:a::12]:80"}},
			{Name: "checkout.mesh.example", Addresses: []string{"10.32.0.13:80"}},
			{Name: "ledger-db", Addresses: []string{"10.40.0.0/24:5432"}},
			{Name: "mail.mesh.example", Addresses: []string{"10.32.0.15:80", "[fd20:a::15]:80"}},
			{Name: "metrics-push", Addresses: []string{"*:9091"}},
		},
		Channels: []status.Channel{
			{Name: "guest_attributes", Enabled: true, Up: true, Last: noon.Add(-40 * time.Second), Written: 312,
				Budget: status.Budget{Unit: "queries", Left: 7, Most: 10, PerMinute: 6}},
			{Name: "serial", Enabled: true, Up: true, Last: noon.Add(-20 * time.Minute), Written: 88,
				Budget: status.Budget{Unit: "lines", Left: 900, Most: 1000}},
			{Name: "cloud_logging", Error: "off: --cloud-logging is not given"}},
		Cost: status.Cost{EnvoyShare: 0.0021, CPUShare: 0.003, Window: 60, Resident: 31_400_000,
			Bucket: status.Bucket{Level: 5.4, Size: 6, Share: .1}, Questions: []status.Question{
				{Name: "dump", Count: 31, Seconds: 2.1, Recent: .07},
				{Name: "look", Count: 180_244, Seconds: 187, Recent: .0621},
				{Name: "server_info", Count: 4, Seconds: .0092}, {Name: "bootstrap"}}},
		Samples: samples(60),
		History: []status.Transition{
			{Time: noon.Add(-50 * time.Hour), Severity: "info", Text: "service-proxy-agent 1.2.3 starts"},
			{Time: noon.Add(-26 * time.Hour), Severity: "info", Text: "service found: metrics-push (*:9091)"},
			{Time: noon.Add(-40 * time.Minute), Severity: "info", Text: "service changed: cart.mesh.example (10.32.0.12:80, 10.32.0.12:443, [fd20:a::12]:80; was 10.32.0.12:80)"},
			{Time: noon.Add(-21 * time.Minute), Severity: "error", Text: "Envoy is not running"},
			{Time: noon.Add(-20 * time.Minute), Severity: "warning", Text: "rules of ours were changed, and repaired: 1 rule of SERVICE_PROXY_OUTPUT was missing", By: "iptables (4711)", ID: "drift", Kind: status.OfDrift, Times: 3, First: noon.Add(-30 * time.Minute)},
			{Time: noon.Add(-19 * time.Minute), Severity: "info", Text: "Envoy is not running: is over after 2 minutes"},
		},
	}
	return Content{Time: noon, Host: "vm-frontend-7", Commit: "0123456789ab", Status: &s, Seen: s,
		Report: report(nil, nil), Counts: map[string]Count{
			"10.32.0.11:80": {Connections: 18_204, Row: "1"}, "10.32.0.12:80": {Connections: 911, Shared: true, Row: "2"},
			"10.32.0.12:443": {Connections: 911, Shared: true, Row: "2"}, "[fd20:a::12]:80": {Connections: 12, Row: "3"},
			"10.32.0.13:80": {Connections: 7, Row: "4"}, "10.40.0.0/24:5432": {Connections: 1_204_551, Row: "5"},
			"10.32.0.15:80": {Row: "6"}, "*:9091": {Connections: 44, Row: "7"}},
	}
}

func envoyDown() Content {
	c := healthy()
	s := *c.Status
	s.Mode, s.Ready, s.NotReady = "bypass", false, "Envoy does not answer on 127.0.0.1:15000"
	s.Since = noon.Add(-4 * time.Minute)
	s.ControlPlane = status.ControlPlane{}
	s.Envoy = status.Envoy{Admin: "127.0.0.1:15000", Down: noon.Add(-4 * time.Minute)}
	s.Families = []status.Family{
		{Family: "IPv4", Usable: true, Equal: true, Services: 6, ServicePorts: 1, Rules: 27, OutboundPort: 15001,
			Applied: noon.Add(-4 * time.Minute), Shape: &status.Shape{Held: "the jumps: Envoy is down, and --when-envoy-down is bypass"},
			Left: []status.Left{{Rule: "-A SERVICE_PROXY_INBOUND -m addrtype ! --dst-type LOCAL -j RETURN", Why: "Extension addrtype is not supported, missing kernel module?"}}},
		{Family: "IPv6", Error: "ip6tables: the table nat does not exist"}}
	s.Channels[0].Up, s.Channels[0].Error, s.Channels[0].Dropped, s.Channels[0].Waiting = false, "the metadata server answers 503", 12, 3
	s.Channels[0].Budget.Left, s.Channels[0].Budget.Next = 0, noon.Add(7*time.Second)
	c.Status = &s
	down := symptom.Finding{ID: symptom.EnvoyDown, Row: 1, Severity: symptom.Error,
		Since:    noon.Add(-4 * time.Minute),
		Cause:    "Envoy does not run: nothing listens on 127.0.0.1:15000 (connect: connection refused). systemd says: failed, exit code 1, 5 restarts",
		Next:     "read the end of its log, mend what it names, and start it",
		Commands: []string{"systemctl status service-proxy-envoy", "journalctl -u service-proxy-envoy -n 50 --no-pager", "systemctl restart service-proxy-envoy"},
		Evidence: []symptom.Evidence{
			{Source: symptom.FromEnvoy, Time: noon, Text: "dial tcp 127.0.0.1:15000: connect: connection refused"},
			{Source: symptom.FromEnvoyLog, Time: noon.Add(-4 * time.Minute), Text: "[critical][main] [source/server/server.cc:128] error initializing configuration '/etc/envoy/envoy.json': Unable to parse JSON as proto"}}}
	closed := symptom.Finding{ID: symptom.InterceptionNotReady, Severity: symptom.Error, Key: "127.0.0.1:15001", ExplainedBy: symptom.EnvoyDown,
		Cause: "nobody listens on 127.0.0.1:15001, Envoy's outbound interception port", Next: "see to Envoy first"}
	unconfigured := symptom.Finding{ID: symptom.EnvoyNotConfigured, Row: 2, Severity: symptom.Error,
		ExplainedBy: symptom.InterceptionNotReady,
		Cause:       "Envoy has not received its configuration", Next: "see to Envoy first"}
	off := symptom.Finding{ID: symptom.GuestAttributesOff, Row: 27, Severity: symptom.Warning,
		Cause: "guest attributes are disabled on this VM: nobody outside can see how it is", Next: "enable them",
		Commands: []string{"gcloud compute instances add-metadata vm-frontend-7 --zone=europe-west1-b --metadata=enable-guest-attributes=TRUE"}}
	other := symptom.Finding{ID: symptom.OtherChain, Row: 34, Severity: symptom.Advice, Key: "DOCKER",
		Cause: "the nat chain OUTPUT leads to DOCKER before ours", Next: "nothing, unless connections go astray"}
	c.Report = report([]symptom.Finding{down, closed, unconfigured, off, other},
		map[symptom.Source]string{
			symptom.FromClusters: "no usable answer", symptom.FromEnvoyLog: "needs root or the group envoy"})
	c.NoCounts = "read the counters of IPv6 table nat: no such table"
	return c
}

func noDaemon() Content {
	c := healthy()
	c.Seen = status.Status{Envoy: c.Status.Envoy, Families: []status.Family{
		{Family: "IPv4", Error: "needs root"}, {Family: "IPv6", Error: "needs root"}}}
	c.Seen.Services = c.Status.Services[:3]
	c.Status, c.NoStatus, c.Counts, c.NoCounts = nil, "needs root", nil, "needs root"
	c.Report = report(nil, map[symptom.Source]string{symptom.FromAgent: "needs root", symptom.FromKernel: "needs root", symptom.FromFilter: "needs root"})
	return c
}

func many(n int) Content {
	c := healthy()
	s := *c.Status
	s.Services, c.Counts = nil, map[string]Count{}
	for i := range n {
		address := fmt.Sprintf("10.%d.%d.%d:80", 32+i>>16, i>>8&255, i&255)
		s.Services = append(s.Services, status.Service{Name: fmt.Sprintf("svc-%05d.mesh.example", i), Addresses: []string{address}})
		c.Counts[address] = Count{Connections: uint64(i * i % 9973), Row: address}
	}
	s.Families[0].Services, s.Families[0].Rules = n, n+130
	c.Status = &s
	return c
}

func goldens() map[string]Content {
	live := healthy()
	live.Live, live.Age = true, time.Minute
	return map[string]Content{"healthy": healthy(), "envoy-down": envoyDown(), "no-daemon": noDaemon(), "live": live}
}

func rendered(t testing.TB, c Content) string {
	t.Helper()
	var b bytes.Buffer
	if err := Render(&b, c); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestGolden(t *testing.T) {
	for name, c := range goldens() {
		t.Run(name, func(t *testing.T) {
			have := strings.Replace(rendered(t, c), style, "", 1)
			file := filepath.Join("testdata", name+".html")
			if *update {
				if err := os.WriteFile(file, []byte(have), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), have); diff != "" {
				t.Errorf("%s (-want +have):\n%s", file, diff)
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pages are all kinds of pages, by name.
func pages(t testing.TB) map[string]string {
	t.Helper()
	all := map[string]string{}
	for name, c := range goldens() {
		all[name] = rendered(t, c)
	}
	all["many"] = rendered(t, many(10_000))
	for name, q := range map[string]Question{
		"explain-empty": {},
		"explain": {To: "10.32.0.12:80", UID: "www-data",
			Answer: "10.32.0.12:80 is intercepted\n\n  kernel\n    OUTPUT 1  -p tcp -j SERVICE_PROXY_OUTPUT  12 packets\n"},
	} {
		q.Time, q.Host = noon, "vm-frontend-7"
		var b bytes.Buffer
		must(t, RenderQuestion(&b, q))
		all[name] = b.String()
	}
	return all
}

// hostile has a word wherever somebody else's may stand.
func hostile(word string) Content {
	c := envoyDown()
	s := *c.Status
	s.Version, s.Mode, s.NotReady, s.Backend, s.LastDriftBy = word, word, word, word, word
	s.ControlPlane = status.ControlPlane{Known: true, Target: word, Error: word,
		Closed: &status.Close{Message: word, Target: word}}
	s.Bootstrap = status.Bootstrap{Status: word, Failure: word}
	s.Envoy = status.Envoy{Admin: word, State: word, Version: word, Number: word, Node: word,
		Rejected: 2}
	s.Families = []status.Family{{Family: word, Error: word, Usable: true,
		Shape: &status.Shape{Held: word},
		Left:  []status.Left{{Rule: word, Why: word}}}}
	s.Cost.Questions = []status.Question{{Name: word, Count: 1}}
	s.Services = nil
	for i := range 60 {
		s.Services = append(s.Services, status.Service{Name: word + fmt.Sprint(i),
			Addresses: []string{word, word}})
	}
	s.Channels = []status.Channel{{Name: word, Enabled: true, Error: word,
		Budget: status.Budget{Unit: word, Most: 1}}}
	s.History = []status.Transition{{Time: noon, Severity: word, Text: word, By: word, Key: word,
		ID: symptom.ID(word)}}
	s.Samples[3].State = word
	c.Status = &s
	c.Host, c.Commit, c.NoStatus, c.NoCounts, c.Live = word, word, word, word, true
	c.Counts = map[string]Count{word: {Connections: 1, Row: word}}
	evil := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error, Key: word, Cause: word,
		Next:     word,
		Commands: []string{word}, Evidence: []symptom.Evidence{{Source: symptom.Source(word),
			Text: word}}}
	c.Report = report([]symptom.Finding{evil}, map[symptom.Source]string{symptom.FromKernel: word})
	c.Report.Checks[0].Title = word
	return c
}
