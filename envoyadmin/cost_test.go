//go:build lab

package envoyadmin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Full counts and times of issue 6 are for `make soak`.
var soak = os.Getenv("SOAK") != ""

func pack(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	packed, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

// response is a DiscoveryResponse in binary, which Envoy reads from a file 20 times as fast as YAML. Its type would bring in gRPC.
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
		Name: "TRAFFICDIRECTOR_INTERCEPTION_LISTENER", TrafficDirection: corev3.TrafficDirection_OUTBOUND, Address: address("0.0.0.0", 15001),
		ListenerFilters: []*listenerv3.ListenerFilter{{Name: "envoy.filters.listener.original_dst", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(t, &originalv3.OriginalDst{})}}},
	}
	hcm := pack(t, &hcmv3.HttpConnectionManager{
		StatPrefix:     "trafficdirector",
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: "URL_MAP/123456789012_some-url-map_0_1234567890123456789", ConfigSource: files("RDS")}},
		HttpFilters: []*hcmv3.HttpFilter{
			{Name: "envoy.filters.http.fault", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(t, &faultv3.HTTPFault{})}},
			{Name: "envoy.filters.http.router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(t, &routerv3.Router{SuppressEnvoyHeaders: true})}},
		},
		UpgradeConfigs:            []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		HttpProtocolOptions:       &corev3.Http1ProtocolOptions{AcceptHttp_10: true},
		Http2ProtocolOptions:      &corev3.Http2ProtocolOptions{MaxConcurrentStreams: wrapperspb.UInt32(100)},
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST},
		UseRemoteAddress:          wrapperspb.Bool(true), StripPortMode: &hcmv3.HttpConnectionManager_StripAnyHostPort{StripAnyHostPort: true},
		NormalizePath: wrapperspb.Bool(true), MergeSlashes: true,
	})
	for i := range n {
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
			Name:             fmt.Sprintf("service-%d", i),
			FilterChainMatch: &listenerv3.FilterChainMatch{PrefixRanges: []*corev3.CidrRange{{AddressPrefix: vip(i), PrefixLen: wrapperspb.UInt32(32)}}, DestinationPort: wrapperspb.UInt32(80)},
			Filters:          []*listenerv3.Filter{{Name: "envoy.filters.network.http_connection_manager", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: hcm}}},
		})
	}
	return l
}

func vip(i int) string { return fmt.Sprintf("10.128.%d.%d", i/256, i%256) }

func address(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

func files(path string) *corev3.ConfigSource {
	return &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, InitialFetchTimeout: durationpb.New(100 * time.Millisecond),
		ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{Path: path}}}
}

// bigEnvoy runs an Envoy with n services and as many clusters. push replaces its listeners; it adds a small one, whose changes cost Envoy little.
func bigEnvoy(t testing.TB, n int) (e *envoy, push func(changes int)) {
	clusters := make([]proto.Message, n)
	for i := range clusters {
		clusters[i] = &clusterv3.Cluster{Name: fmt.Sprintf("cloud-internal-%d", i), ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, ConnectTimeout: durationpb.New(time.Second)}
	}
	var many proto.Message
	push = func(changes int) {
		small := &listenerv3.Listener{Name: "small", Address: address("127.0.0.1", 15077), BindToPort: wrapperspb.Bool(false), DefaultFilterChain: services(t, 1).FilterChains[0]}
		small.DefaultFilterChain.Name = fmt.Sprint("change-", changes)
		small.DefaultFilterChain.FilterChainMatch = nil
		e.fixPaths(small)
		e.write("lds.pb", response(t, many, small))
	}
	e = prepare(t, newest)
	l := services(t, n)
	e.fixPaths(l)
	many = l
	e.write("cds.pb", response(t, clusters...))
	push(0)
	e.boot("LABDIR/lds.yaml", e.path("lds.pb"), "DYNAMIC", "  cds_config: {resource_api_version: V3, path_config_source: {path: "+e.path("cds.pb")+"}}")
	e.run()
	e.until(time.Minute, func() error {
		s, err := e.client.Listeners(context.Background())
		if err == nil && (len(s.Warming) > 0 || s.Fingerprint.Listeners != 2) {
			err = fmt.Errorf("%+v", s.Fingerprint)
		}
		return err
	})
	return e, push
}

// fixPaths names the file of routes in each chain.
func (e *envoy) fixPaths(l *listenerv3.Listener) {
	done := map[string]*anypb.Any{}
	for _, chain := range append(slices.Clip(l.FilterChains), l.DefaultFilterChain) {
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

// TestMain is also the child processes: the one that BenchmarkDumpOf10000 measures (one way, one file), and the control plane of TestRejectionStorm.
func TestMain(m *testing.M) {
	if socket := os.Getenv("ENVOYADMIN_STORM"); socket != "" {
		if err := stormFrom(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
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

// BenchmarkDumpOf10000 holds the reading of a large dump against protojson and against not looking at it at all, in one run: at least 6 times as fast, and
// at most 35 MB resident at its peak.
func BenchmarkDumpOf10000(t *testing.B) {
	const n = 10_000
	e, _ := bigEnvoy(t, n)
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
		t.Logf("%-24s %7.1f ms %7.0f MB/s   peak %3d MB resident", name, float64(best[name].Microseconds())/1e3, float64(len(body))/1e6/best[name].Seconds(), peak[name]/1024)
	}
	t.ReportMetric(float64(best["envoyadmin"]), "ns/op")
	t.ReportMetric(float64(best["protojson of the whole"])/float64(best["envoyadmin"]), "×protojson")
	t.ReportMetric(float64(peak["envoyadmin"])/1024, "MB-peak")
	if ratio := float64(best["protojson of the whole"]) / float64(best["envoyadmin"]); ratio < 6 {
		t.Errorf("%.1f times as fast as protojson", ratio)
	}
	if kb := peak["envoyadmin"]; kb > 35*1024 {
		t.Errorf("%d KB resident at the peak", kb)
	}
}

// watcher is what the agent does with this package (agent's envoyWatch), in the same rhythm: log, detector, Envoy's state
// and its stream to the control plane.
type watcher struct {
	looks, dumps, states, streams int
	mu                            sync.Mutex
	seen                          map[string]time.Time // change-N: when a dump had it
	details                       map[string]int       // of rejections, as the log told them
	failed                        error
}

func (w *watcher) run(ctx context.Context, e *envoy) {
	ctx, cancel := context.WithCancel(ctx)
	log := FollowLog(ctx, e.path("envoy.err.log"))
	defer func() {
		cancel()
		for range log {
		}
	}()
	const stateEvery, connectionEvery = time.Second, 15 * time.Second // as in package agent
	var (
		d               Detector
		stats           Pace
		asked, streamAt time.Time
	)
	failed := func(err error) {
		if err != nil && ctx.Err() == nil {
			w.failed = err
		}
	}
	for ctx.Err() == nil {
		began := time.Now()
		switch action, wait := d.Next(began); action {
		case Wait:
			if began.Sub(asked) >= stateEvery {
				asked = began
				_, err := e.client.Ready(ctx)
				failed(err)
				w.states++
			}
			if now := time.Now(); now.Sub(streamAt) >= connectionEvery && stats.Due(now) {
				streamAt = now
				_, err := e.client.ControlPlane(ctx)
				failed(err)
				stats.Asked(now, time.Now())
				w.streams++
			}
			wait = min(wait, stateEvery)
			select {
			case <-ctx.Done():
			case event := <-log:
				if event.Kind == ListenerRejected {
					w.details[event.Listener+": "+event.Details]++
				}
				d.Hint(time.Now())
			case <-time.After(wait):
			}
		case Look:
			f, err := e.client.Fingerprint(ctx)
			d.Looked(began, time.Now(), f, err)
			w.looks++
		case Dump:
			s, err := e.client.Listeners(ctx)
			d.Dumped(began, time.Now(), s.Fingerprint, err)
			failed(err)
			w.dumps++
			w.mu.Lock()
			for _, l := range s.Listeners {
				if l.DefaultChain != nil && w.seen[l.DefaultChain.Name].IsZero() {
					w.seen[l.DefaultChain.Name] = time.Now()
				}
			}
			w.mu.Unlock()
		}
	}
}

func (w *watcher) String() string {
	return fmt.Sprintf("%d looks, %d dumps, %d times its state, %d its stream", w.looks, w.dumps, w.states, w.streams)
}

func (w *watcher) during(e *envoy, length time.Duration) {
	w.seen, w.details = map[string]time.Time{}, map[string]int{}
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	w.run(ctx, e)
}

// TestShareOfMainThread measures what we cost Envoy's main thread, against the same Envoy without us: at most 1 % idle, and 10 % under one change a second.
func TestShareOfMainThread(t *testing.T) {
	length, counts := 6*time.Second, []int{10, 1_000}
	if soak {
		length, counts = time.Minute, []int{10, 1_000, 10_000}
	}
	for _, n := range counts {
		t.Run(fmt.Sprint(n, " services"), func(t *testing.T) {
			if !soak {
				t.Parallel() // the time is processor time
			}
			e, push := bigEnvoy(t, n)
			changes := 0
			// Each second for a while, and when.
			changing := func() (when map[string]time.Time) {
				when = map[string]time.Time{}
				for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Second) {
					changes++
					push(changes)
					when[fmt.Sprint("change-", changes)] = time.Now()
				}
				return when
			}
			share := func(during func()) float64 {
				before, began := e.mainThread(), time.Now()
				during()
				return 100 * float64(e.mainThread()-before) / float64(time.Since(began))
			}
			// The first dump is not part of what is measured.
			start := func(w *watcher) (stop func()) {
				w.seen, w.details = map[string]time.Time{}, map[string]int{}
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan struct{})
				go func() { defer close(done); w.run(ctx, e) }()
				e.until(time.Minute, func() error {
					w.mu.Lock()
					defer w.mu.Unlock()
					if len(w.seen) == 0 {
						return errors.New("the first dump did not come")
					}
					return nil
				})
				time.Sleep(2 * time.Second) // Envoy tidies up after it
				return func() { cancel(); <-done }
			}
			var idle, busy watcher
			var when map[string]time.Time
			alone := share(func() { time.Sleep(length) })
			stop := start(&idle)
			idleWith := share(func() { time.Sleep(length) })
			stop()
			aloneChanging := share(func() { changing() })
			stop = start(&busy)
			withChanging := share(func() { when = changing() })
			e.until(time.Minute, func() error { // the last change may have to wait for its dump
				busy.mu.Lock()
				defer busy.mu.Unlock()
				if last := fmt.Sprint("change-", changes); busy.seen[last].IsZero() {
					return errors.New(last + " was not seen")
				}
				return nil
			})
			stop()
			if idle.failed != nil || busy.failed != nil {
				t.Error(idle.failed, busy.failed)
			}
			var late []time.Duration
			for change, at := range when {
				// A change that was overtaken by the next before a dump was due is seen with that one.
				var first time.Time
				number, _ := strconv.Atoi(strings.TrimPrefix(change, "change-"))
				for name, seen := range busy.seen {
					if other, err := strconv.Atoi(strings.TrimPrefix(name, "change-")); err == nil && other >= number && (first.IsZero() || seen.Before(first)) {
						first = seen
					}
				}
				if first.IsZero() {
					t.Errorf("%s was never seen", change)
					continue
				}
				late = append(late, max(0, first.Sub(at)))
			}
			slices.Sort(late)
			t.Logf("idle: %.2f %% alone, %.2f %% with us (%s); one change a second: %.1f %% alone, %.1f %% with us (%s); change to seen: median %v, worst %v",
				alone, idleWith, idle.String(), aloneChanging, withChanging, busy.String(), late[len(late)/2].Round(time.Millisecond), late[len(late)-1].Round(time.Millisecond))
			if cost := idleWith - alone; cost > 1 {
				t.Errorf("idle, we cost %.2f %%", cost)
			}
			limit := 10.0
			if !soak {
				// Of so short a time one dump more than its share is more than noise: here one costs 100 ms at most.
				limit += 100 * float64(100*time.Millisecond) / float64(length)
			}
			if cost := withChanging - aloneChanging; cost > limit {
				t.Errorf("under one change a second, we cost %.1f %%", cost)
			}
		})
	}
}

// stormFrom is a control plane on a unix socket that sends a good listener and one that Envoy refuses, and answers each rejection at once by the same again.
// It runs until its standard input ends.
func stormFrom(socket string) error {
	server := controlplane.New(controlplane.Options{Listen: func() (net.Listener, error) { return net.Listen("unix", socket) }})
	if err := server.Start(); err != nil {
		return err
	}
	defer server.Close()
	server.Storm(true)
	config := controlplane.Config{Listeners: []*listenerv3.Listener{controlplane.RefusedListener("refused", 15011, "/nonexistent/access.log")}}
	for i := range 10 {
		config.Services = append(config.Services, controlplane.Service{Name: fmt.Sprint("service-", i), Prefixes: controlplane.VIPs(vip(i)), Port: 80, HTTP: true})
	}
	if _, err := server.Set(config); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// TestRejectionStorm has a control plane that sends a refused listener again as fast as it can, over 1,000 times a second. One failure is told with its
// details, the good listener stays, and it costs us at most 2 % of a core.
func TestRejectionStorm(t *testing.T) {
	length := 10 * time.Second
	if soak {
		length = time.Minute
	}
	e := prepare(t, newest)
	storm := exec.Command(os.Args[0])
	storm.Env = append(os.Environ(), "ENVOYADMIN_STORM="+e.path("xds.sock"))
	storm.Stderr = os.Stderr
	stop, err := storm.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := storm.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stop.Close(); storm.Wait() }()
	e.boot("  lds_config: {resource_api_version: V3, path_config_source: {path: LABDIR/lds.yaml}}", `  ads_config: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  lds_config: {resource_api_version: V3, ads: {}}
  cds_config: {resource_api_version: V3, ads: {}}`,
		"CLUSTERS", `  - name: xds
    type: STATIC
    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}
    load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: `+e.path("xds.sock")+`}}}}]}]}`)
	e.run()
	lines := func() int {
		text, err := os.ReadFile(e.path("envoy.err.log"))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(text, []byte("' config rejected: "))
	}
	w := watcher{}
	var before, after syscall.Rusage
	n := lines()
	syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	envoyBefore := e.mainThread()
	w.during(e, length)
	envoy := e.mainThread() - envoyBefore
	syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	n = lines() - n
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	share, rate := 100*float64(cpu)/float64(length), float64(n)/length.Seconds()
	t.Logf("%.0f rejections a second: %.2f %% of a core for us (%d looks, %d dumps), %.0f %% for Envoy", rate, share, w.looks, w.dumps, 100*float64(envoy)/float64(length))
	if rate < 300 {
		t.Errorf("only %.0f rejections a second: no storm", rate)
	}
	if rate < 1000 { // a busy machine
		share *= 1000 / rate
	}
	if share > 2 {
		t.Errorf("at 1,000 a second it would take us %.2f %% of a core", share)
	}
	if w.failed != nil {
		t.Error(w.failed)
	}
	if len(w.details) != 1 {
		t.Errorf("the log told of %v, want one text", w.details)
	}
	s, err := e.client.Listeners(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Rejected) != 1 || s.Rejected[0].Name != "refused" || w.details["refused: "+s.Rejected[0].Details] == 0 {
		t.Errorf("rejected: %+v; the log said %v", s.Rejected, w.details)
	}
	if !slices.ContainsFunc(s.Listeners, func(l Listener) bool { return len(l.Chains) == 10 }) {
		t.Error("the good listener is gone")
	}
}
