//go:build lab

package envoyadmin

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	originalv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func pack(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	packed, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

// response is a DiscoveryResponse in binary, which Envoy reads from a file 20 times as fast as
// YAML. Its type would bring in gRPC.
func response(t testing.TB, resources ...proto.Message) string {
	t.Helper()
	var b []byte
	for _, r := range resources {
		one, err := proto.Marshal(pack(t, r))
		if err != nil {
			t.Fatal(err)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, 2, protowire.BytesType), one)
	}
	return string(b)
}

// services is a listener like Traffic Director's with an HTTP filter chain for each of n services.
func services(t testing.TB, n int) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name: "TRAFFICDIRECTOR_INTERCEPTION_LISTENER", TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		Address: address("0.0.0.0", 15001),
		ListenerFilters: []*listenerv3.ListenerFilter{
			{Name: "envoy.filters.listener.original_dst", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(t, &originalv3.OriginalDst{})}}},
	}
	hcm := pack(t, &hcmv3.HttpConnectionManager{
		StatPrefix: "trafficdirector",
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{
			Rds: &hcmv3.Rds{RouteConfigName: "URL_MAP/123456789012_some-url-map_0_1234567890123456789",
				ConfigSource: files("RDS")}},
		HttpFilters: []*hcmv3.HttpFilter{
			{Name: "envoy.filters.http.fault", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(t, &faultv3.HTTPFault{})}},
			{Name: "envoy.filters.http.router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(t, &routerv3.Router{SuppressEnvoyHeaders: true})}},
		},
		UpgradeConfigs: []*hcmv3.HttpConnectionManager_UpgradeConfig{
			{UpgradeType: "websocket"}},
		HttpProtocolOptions: &corev3.Http1ProtocolOptions{AcceptHttp_10: true},
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
			MaxConcurrentStreams: wrapperspb.UInt32(100)},
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST},
		UseRemoteAddress: wrapperspb.Bool(true),
		StripPortMode:    &hcmv3.HttpConnectionManager_StripAnyHostPort{StripAnyHostPort: true},
		NormalizePath:    wrapperspb.Bool(true), MergeSlashes: true,
	})
	for i := range n {
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
			Name: fmt.Sprintf("service-%d", i),
			FilterChainMatch: &listenerv3.FilterChainMatch{
				PrefixRanges:    []*corev3.CidrRange{{AddressPrefix: vip(i), PrefixLen: wrapperspb.UInt32(32)}},
				DestinationPort: wrapperspb.UInt32(80)},
			Filters: []*listenerv3.Filter{
				{Name: "envoy.filters.network.http_connection_manager", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: hcm}}},
		})
	}
	return l
}

func vip(i int) string { return fmt.Sprintf("10.128.%d.%d", i/256, i%256) }

func address(ip string, port uint32) *corev3.Address {
	return &corev3.Address{
		Address: &corev3.Address_SocketAddress{
			SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{
				PortValue: port}}}}
}

func files(path string) *corev3.ConfigSource {
	return &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3,
		InitialFetchTimeout: durationpb.New(100 * time.Millisecond),
		ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{
			PathConfigSource: &corev3.PathConfigSource{Path: path}}}
}

// bigEnvoy runs an Envoy with n services and as many clusters.
func bigEnvoy(t testing.TB, n int) *envoy {
	clusters := make([]proto.Message, n)
	for i := range clusters {
		clusters[i] = &clusterv3.Cluster{Name: fmt.Sprintf("cloud-internal-%d", i),
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
			ConnectTimeout:       durationpb.New(time.Second)}
	}
	e := prepare(t, newest)
	l := services(t, n)
	e.fixPaths(l)
	e.write("cds.pb", response(t, clusters...))
	e.write("lds.pb", response(t, l))
	e.boot("LABDIR/lds.yaml", e.path("lds.pb"), "DYNAMIC",
		"  cds_config: {resource_api_version: V3, path_config_source: {path: "+e.path("cds.pb")+"}}")
	e.run()
	e.until(3*time.Minute, func() error {
		s, err := e.client.Listeners(context.Background())
		if err == nil && (len(s.Warming) > 0 || s.Fingerprint.Listeners != 1) {
			err = fmt.Errorf("%+v", s.Fingerprint)
		}
		return err
	})
	return e
}

// fixPaths names the file of routes in each chain.
func (e *envoy) fixPaths(l *listenerv3.Listener) {
	done := map[string]*anypb.Any{}
	for _, chain := range l.FilterChains {
		for _, f := range chain.GetFilters() {
			packed := f.GetTypedConfig()
			if done[string(packed.Value)] == nil {
				var hcm hcmv3.HttpConnectionManager
				if err := packed.UnmarshalTo(&hcm); err != nil {
					e.t.Fatal(err)
				}
				hcm.GetRds().ConfigSource = files(e.path("rds.yaml"))
				done[string(packed.Value)] = pack(e.t, &hcm)
			}
			f.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: done[string(packed.Value)]}
		}
	}
}

// The ways to read a dump that are compared.
var ways = map[string]func(io.Reader) (chains int, err error){
	"envoyadmin": func(r io.Reader) (int, error) {
		d := &dump{whole: true}
		j := newReader(r)
		if err := j.document(func() error { return j.configs(d.dynamicListener) }); err != nil {
			return 0, err
		}
		n := 0
		for _, l := range d.listeners {
			n += len(l.Chains)
		}
		if len(d.skipped) > 0 {
			return 0, fmt.Errorf("skipped %v", d.skipped)
		}
		return n, nil
	},
	"protojson of the whole": func(r io.Reader) (n int, err error) {
		text, err := io.ReadAll(r)
		if err != nil {
			return 0, err
		}
		var all adminv3.ConfigDump
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, &all); err != nil {
			return 0, err
		}
		for _, c := range all.GetConfigs() {
			var d adminv3.ListenersConfigDump_DynamicListener
			var l listenerv3.Listener
			if err := c.UnmarshalTo(&d); err != nil {
				return 0, err
			}
			if err := d.GetActiveState().GetListener().UnmarshalTo(&l); err != nil {
				return 0, err
			}
			n += len(l.GetFilterChains())
		}
		return n, nil
	},
	"io.Copy(io.Discard)": func(r io.Reader) (int, error) {
		_, err := io.Copy(io.Discard, struct{ io.Reader }{r})
		return 0, err
	},
}

// TestMain is also the child process that BenchmarkDumpOf10000 measures: one way, one file.
func TestMain(m *testing.M) {
	if way := os.Getenv("ENVOYADMIN_WAY"); way != "" {
		f, err := os.Open(os.Getenv("ENVOYADMIN_FILE"))
		if err == nil {
			_, err = ways[way](f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		status, _ := os.ReadFile("/proc/self/status")
		os.Stdout.Write(status)
		return
	}
	os.Exit(m.Run())
}

// BenchmarkDumpOf10000 holds the reading of a large dump against protojson and against not looking
// at it at all, in one run: at least 6 times as fast, and at most 35 MB resident at its peak.
func BenchmarkDumpOf10000(t *testing.B) {
	const n = 10_000
	e := bigEnvoy(t, n)
	body := e.fetch(dynamicPath)
	e.cmd.Process.Kill() // it holds memory that the measurement needs
	file := e.path("dump.json")
	if err := os.WriteFile(file, body, 0o600); err != nil {
		t.Fatal(err)
	}
	best := map[string]time.Duration{}
	peak := map[string]int{}
	for range 7 { // in turns, so that a busy moment hits all
		for name, way := range ways {
			began := time.Now()
			chains, err := way(bytes.NewReader(body))
			took := time.Since(began)
			if err != nil || chains != n && name != "io.Copy(io.Discard)" {
				t.Fatalf("%s: %d chains, %v", name, chains, err)
			}
			if best[name] == 0 || took < best[name] {
				best[name] = took
			}
		}
	}
	for name := range ways {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "ENVOYADMIN_WAY="+name, "ENVOYADMIN_FILE="+file)
		status, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_, hwm, _ := strings.Cut(string(status), "VmHWM:")
		if peak[name], err = strconv.Atoi(strings.Fields(hwm)[0]); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d HTTP chains, %.1f MB", n, float64(len(body))/1e6)
	for _, name := range []string{"envoyadmin", "protojson of the whole", "io.Copy(io.Discard)"} {
		t.Logf("%-24s %7.1f ms %7.0f MB/s   peak %3d MB resident", name,
			float64(best[name].Microseconds())/1e3, float64(len(body))/1e6/best[name].Seconds(),
			peak[name]/1024)
	}
	t.ReportMetric(float64(best["envoyadmin"]), "ns/op")
	t.ReportMetric(float64(best["protojson of the whole"])/float64(best["envoyadmin"]), "×protojson")
	t.ReportMetric(float64(peak["envoyadmin"])/1024, "MB-peak")
	least := 6.0
	if os.Getenv("BENCH_ONCE") != "" {
		least = 3 // make test: boxes run beside, and each is measured a few times
	}
	if ratio := float64(best["protojson of the whole"]) / float64(best["envoyadmin"]); ratio < least {
		t.Errorf("%.1f times as fast as protojson, want %.0f at least", ratio, least)
	}
	if kb := peak["envoyadmin"]; kb > 35*1024 {
		t.Errorf("%d KB resident at the peak", kb)
	}
}

// ran is how long Envoy's main thread has run on a processor so far, of which Envoy's other threads
// and the waiting for a processor are no part.
func (e *envoy) ran() time.Duration {
	e.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/schedstat", e.cmd.Process.Pid))
	if err != nil {
		e.t.Fatal(err)
	}
	ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
	if err != nil {
		e.t.Fatal(err)
	}
	return time.Duration(ns)
}

// BenchmarkLook10000 holds what a look by names costs Envoy's main thread against a look at all, at
// 10,000 services and clusters: 0.7 of it at most. What Envoy tidies up after an answer counts.
// In make test it is only run, at 100: an Envoy of 10,000 takes too long to start.
func BenchmarkLook10000(t *testing.B) {
	n, rounds, pause := 10_000, 5, 200*time.Millisecond
	if os.Getenv("BENCH_ONCE") != "" {
		n, rounds, pause = 100, 1, 10*time.Millisecond
	}
	e := bigEnvoy(t, n)
	e.client.namedFrom = 0
	s, err := e.client.Listeners(t.Context())
	if err != nil || !Nameable(s.Names) {
		t.Fatalf("names %q, %v", s.Names, err)
	}
	ask := map[string]func() error{
		"by names": func() error { _, err := e.client.Fingerprint(t.Context(), s.Names); return err },
		"of all":   func() error { _, err := e.client.Fingerprint(t.Context(), nil); return err },
		"/listeners": func() error {
			return e.client.Copy(t.Context(), listenersPath, maxShort, discard)
		},
		"/ready": func() error { _, err := e.client.Ready(t.Context()); return err },
		"/clusters": func() error {
			return e.client.Copy(t.Context(), "/clusters?format=json", maxLong, discard)
		},
		"dump":    func() error { return e.client.Copy(t.Context(), dynamicPath, maxLong, discard) },
		"nothing": func() error { return nil },
	}
	order := []string{"by names", "of all", "/listeners", "/ready", "/clusters", "dump", "nothing"}
	costs, took := map[string]time.Duration{}, map[string]time.Duration{}
	for range rounds {
		for _, what := range order {
			time.Sleep(pause)
			times := 5
			if what == "dump" || what == "/clusters" {
				times = 1
			}
			before := e.ran()
			for range times {
				began := time.Now()
				if err := ask[what](); err != nil {
					t.Fatal(what, err)
				}
				if d := time.Since(began); took[what] == 0 || d < took[what] {
					took[what] = d
				}
			}
			time.Sleep(pause)
			if d := (e.ran() - before) / time.Duration(times); costs[what] == 0 || d < costs[what] {
				costs[what] = d
			}
		}
	}
	for _, what := range order {
		t.Logf("%-10s %8.2f ms of Envoy's main thread, answered in %8.2f ms", what,
			float64(costs[what].Microseconds())/1e3, float64(took[what].Microseconds())/1e3)
	}
	ratio := float64(costs["by names"]) / float64(costs["of all"])
	t.ReportMetric(float64(costs["by names"]), "ns/op")
	t.ReportMetric(ratio, "×all")
	if ratio > 0.7 && n == 10_000 {
		t.Errorf("a look by names costs %.2f of one at all, want 0.7 at most", ratio)
	}
}

func discard(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}
