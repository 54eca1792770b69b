package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
)

// EnvoyUID is the uid and gid that Envoy runs under unless told otherwise. It needs no
// entry in /etc/passwd.
const EnvoyUID = 21337

// AdminAddr is where Envoy's admin interface listens, in "vm".
var AdminAddr = netip.MustParseAddrPort("127.0.0.1:15000")

// FindEnvoy is the Envoy to test with: $ENVOY, else build/envoy-1.40.0 under the module's root.
func FindEnvoy() (string, error) {
	if path := os.Getenv("ENVOY"); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("find Envoy named by $ENVOY: %w", err)
		}
		return filepath.Abs(path)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find Envoy: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			path := filepath.Join(dir, "build", "envoy-1.40.0")
			if _, err := os.Stat(path); err != nil {
				return "", fmt.Errorf("find Envoy: no %s: run `make tools`, or name one by $ENVOY", path)
			}
			return path, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("find Envoy: not under the module's folder: name one by $ENVOY")
		}
	}
}

// EnvoyOptions of an Envoy. Only ControlPlane or Bootstrap is needed.
type EnvoyOptions struct {
	Binary       string         // empty: FindEnvoy
	UID          uint32         // and gid; 0: EnvoyUID
	ControlPlane netip.AddrPort // ADS, by plain HTTP/2 unless CA is set
	// PEM of the authority that the control plane's certificate is checked against
	CA         []byte
	ServerName string // the name in that certificate; empty: trafficdirector.googleapis.com
	// LookUp has Envoy look this name up to find its control plane, at ControlPlane's port.
	LookUp   string
	NodeID   string         // empty: projects/123456789012/networks/default/nodes/lab
	Metadata map[string]any // node metadata
	// an RTDS layer traffic_director_runtime: until it is answered, or 15 s long,
	// Envoy is PRE_INITIALIZING
	Runtime  bool
	LogLevel string // empty: info
	// initial_fetch_timeout of clusters and listeners: until then Envoy waits for
	// each; 0: Envoy's 15 s
	FetchTimeout time.Duration
	// Bootstrap, when set, is the whole configuration, and of the above only Binary,
	// UID and LogLevel count.
	Bootstrap []byte
	Args      []string // more arguments
	// HotRestart lets Envoy.HotRestart start the next one beside it.
	HotRestart bool
	// Supervisor is the service-proxy-agent that Envoy runs under, as in its unit; empty: none.
	Supervisor     string
	SupervisorArgs []string
	// Container has it run as from an image.
	Container *Container
}

// Envoy is an Envoy in "vm". One after the other may run under the same value (Start, Kill, Start).
type Envoy struct {
	LogPath     string // stderr, appended to from start to start; or its --log-path, of a container
	AdminSocket string // of a container; "": AdminAddr
	UID         uint32 // as the VM sees it

	lab    *Lab
	argv   []string
	admin  *http.Client
	mu     sync.Mutex
	cmd    *exec.Cmd // nil: not running
	exited chan struct{}
	epoch  int

	config    string // its path
	reload    []string
	container *Container
}

// hotRestarts counts the Envoys of this process that may be restarted so.
var hotRestarts atomic.Int32

// StartEnvoy writes a bootstrap and starts an Envoy; it ends with the lab. It does
// not wait: see WaitReady.
func (l *Lab) StartEnvoy(opts EnvoyOptions) (*Envoy, error) {
	if opts.Binary == "" {
		var err error
		if opts.Binary, err = FindEnvoy(); err != nil {
			return nil, err
		}
	}
	if opts.UID == 0 {
		opts.UID = EnvoyUID
	}
	var err error
	uid := opts.UID
	if opts.Container != nil {
		uid += opts.Container.FirstUID
	}
	if opts.Binary, err = l.reachable(opts.Binary, uid); err != nil {
		return nil, err
	}
	if opts.LogLevel == "" {
		opts.LogLevel = "info"
	}
	if opts.Bootstrap == nil {
		var err error
		if opts.Bootstrap, err = bootstrap(opts); err != nil {
			return nil, err
		}
	}
	config := filepath.Join(l.Dir, "envoy.json")
	if err := os.WriteFile(config, opts.Bootstrap, 0o644); err != nil {
		return nil, fmt.Errorf("write Envoy's bootstrap: %w", err)
	}
	e := &Envoy{
		LogPath: filepath.Join(l.Dir, "envoy.err.log"), UID: opts.UID, lab: l,
		argv: append([]string{opts.Binary, "-c", config, "--concurrency", "1", "-l", opts.LogLevel},
			opts.Args...),
		admin: l.VM.HTTP(), config: config,
	}
	switch {
	case opts.Container != nil:
		if err := e.contain(opts); err != nil {
			return nil, err
		}
	case opts.Supervisor != "":
		if err := e.supervise(opts); err != nil {
			return nil, err
		}
	case opts.HotRestart:
		// The id names shared memory of the whole machine, ten times the id, which stays there. No two
		// labs may have the same: one's Envoy would meet the other's that is just starting.
		id := os.Getpid()%100_000*1000 + int(hotRestarts.Add(1))%1000
		l.atEnd(func() { os.Remove(fmt.Sprintf("/dev/shm/envoy_shared_memory_%d", 10*id)) })
		e.argv = append(e.argv, "--base-id", fmt.Sprint(id), "--drain-time-s", "1",
			"--parent-shutdown-time-s", "60")
	default:
		e.argv = append(e.argv, "--disable-hot-restart")
	}
	l.atEnd(func() { e.Kill() })
	return e, e.Start()
}

// reachable is the binary at a path where the user can run it: a checkout may lie in a folder
// that only root can enter.
func (l *Lab) reachable(binary string, uid uint32) (string, error) {
	if l.VM.CommandAs(context.Background(), uid, "test", "-x", binary).Run() == nil {
		return binary, nil
	}
	path := filepath.Join(l.Dir, filepath.Base(binary))
	if _, err := os.Stat(path); err == nil || os.Link(binary, path) == nil {
		return path, nil
	}
	from, err := os.Open(binary) // on another file system
	if err != nil {
		return "", fmt.Errorf("make Envoy reachable for uid %d: %w", uid, err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err == nil {
		_, err = io.Copy(to, from)
		err = errors.Join(err, to.Close())
	}
	if err != nil {
		return "", fmt.Errorf("make Envoy reachable for uid %d: %w", uid, err)
	}
	return path, nil
}

// Start starts Envoy again after Kill or Stop.
func (e *Envoy) Start() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cmd != nil {
		return errors.New("start Envoy: it runs")
	}
	start := e.startPlain
	if e.container != nil {
		start = e.startContained
	}
	cmd, err := start()
	if err != nil {
		return err
	}
	exited := make(chan struct{})
	e.cmd, e.exited = cmd, exited
	go func() {
		cmd.Wait() // its exit is what Kill, Stop and Exited tell; the reason is in the log
		e.mu.Lock()
		if e.cmd == cmd {
			e.cmd = nil
		}
		e.mu.Unlock()
		close(exited)
	}()
	return nil
}

func (e *Envoy) startPlain() (*exec.Cmd, error) {
	log, err := os.OpenFile(e.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open Envoy's log: %w", err)
	}
	defer log.Close()
	cmd := e.lab.VM.CommandAs(context.Background(), e.UID, e.argv[0], e.argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := Start(cmd); err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	return cmd, nil
}

// HotRestart starts the next Envoy beside the running one, which hands its listeners over and ends
// a minute later, or with the lab. From now on e is the new one.
func (e *Envoy) HotRestart() error {
	e.mu.Lock()
	old := *e.cmd
	exited := e.exited
	e.cmd = nil
	e.epoch++
	e.argv = append(slices.Clip(e.argv), "--restart-epoch", fmt.Sprint(e.epoch))
	e.mu.Unlock()
	e.lab.atEnd(func() { old.Process.Kill(); <-exited })
	// While the old one's workers are still starting, which /ready does not tell, the new one ends at
	// once: "previous envoy process is still initializing".
	for range 20 {
		if err := e.Start(); err != nil {
			return err
		}
		e.mu.Lock()
		ended := e.exited
		e.mu.Unlock()
		select {
		case <-ended:
			time.Sleep(500 * time.Millisecond)
		case <-time.After(time.Second):
			return nil
		}
	}
	return fmt.Errorf("start the next Envoy: it ends at once: %s", e.LogTail(3))
}

// PID is Envoy's process, or 0.
func (e *Envoy) PID() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cmd == nil {
		return 0
	}
	return e.cmd.Process.Pid
}

// signal sends to the running Envoy and returns the channel that its exit
// closes (nil if none runs).
func (e *Envoy) signal(sig os.Signal) chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cmd == nil {
		return nil
	}
	e.cmd.Process.Signal(sig) // a process that has just ended is what its exit tells
	return e.exited
}

// Kill kills Envoy (kill -9) and waits for its end.
func (e *Envoy) Kill() {
	if exited := e.signal(syscall.SIGKILL); exited != nil {
		<-exited
	}
}

// Stop asks Envoy to end (SIGTERM) and waits for it, 5 s at most, then kills it.
func (e *Envoy) Stop() {
	if exited := e.signal(syscall.SIGTERM); exited != nil {
		select {
		case <-exited:
		case <-time.After(5 * time.Second):
			e.Kill()
		}
	}
}

// Restart is Kill and Start.
func (e *Envoy) Restart() error {
	e.Kill()
	return e.Start()
}

// Pause stops Envoy where it stands (SIGSTOP): ports accept, nothing answers. Continue undoes it.
func (e *Envoy) Pause() { e.signal(syscall.SIGSTOP) }

// Continue undoes Pause.
func (e *Envoy) Continue() { e.signal(syscall.SIGCONT) }

// Admin asks the admin interface: GET path.
func (e *Envoy) Admin(ctx context.Context, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+AdminAddr.String()+path, nil)
	if err != nil {
		return "", fmt.Errorf("ask Envoy %s: %w", path, err)
	}
	resp, err := e.admin.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask Envoy %s: %w", path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("ask Envoy %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return string(body),
			fmt.Errorf("ask Envoy %s: %s: %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return string(body), nil
}

// WaitReady waits until Envoy is LIVE; an error has the end of its log.
func (e *Envoy) WaitReady(ctx context.Context) error {
	err := eventually(ctx, func() error {
		_, err := e.Admin(ctx, "/ready")
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for Envoy: %w; its log ends:\n%s", err, e.LogTail(20))
	}
	return nil
}

// LogTail is the last n lines of Envoy's log.
func (e *Envoy) LogTail(n int) string {
	log, err := os.ReadFile(e.LogPath)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(log), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// xds is the name of the control plane's cluster.
const xds = "xds"

// xdsCluster is where Envoy finds its control plane.
func xdsCluster(opts EnvoyOptions) (*clusterv3.Cluster, error) {
	cluster := &clusterv3.Cluster{
		Name:                 xds,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(2 * time.Second),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: xds, Endpoints: []*endpointv3.LocalityLbEndpoints{{
				LbEndpoints: []*endpointv3.LbEndpoint{
					{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
						Endpoint: &endpointv3.Endpoint{Address: socket(opts.ControlPlane)}}}},
			}}},
	}
	http2, err := packed(&httpv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
					Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
			},
		}})
	if err != nil {
		return nil, err
	}
	cluster.TypedExtensionProtocolOptions = map[string]*anypb.Any{
		"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2}
	if opts.LookUp != "" {
		cluster.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STRICT_DNS}
		cluster.DnsLookupFamily = clusterv3.Cluster_V4_ONLY
		at := cluster.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint()
		at.Address.GetSocketAddress().Address = opts.LookUp
	}
	if opts.CA != nil {
		context, err := packed(&tlsv3.UpstreamTlsContext{
			Sni: opts.ServerName,
			CommonTlsContext: &tlsv3.CommonTlsContext{
				AlpnProtocols: []string{"h2"}, // gRPC refuses a handshake without it
				ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{
					ValidationContext: &tlsv3.CertificateValidationContext{
						TrustedCa: &corev3.DataSource{
							Specifier: &corev3.DataSource_InlineBytes{InlineBytes: opts.CA}},
					}},
			},
		})
		if err != nil {
			return nil, err
		}
		cluster.TransportSocket = &corev3.TransportSocket{Name: "envoy.transport_sockets.tls",
			ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: context}}
	}
	return cluster, nil
}

// bootstrap is a plain ADS bootstrap: what the product writes for Traffic Director is the product's
// business, and goes in by EnvoyOptions.Bootstrap.
func bootstrap(opts EnvoyOptions) ([]byte, error) {
	if !opts.ControlPlane.IsValid() {
		return nil, errors.New("write Envoy's bootstrap: no control plane named")
	}
	if opts.NodeID == "" {
		opts.NodeID = "projects/123456789012/networks/default/nodes/lab"
	}
	if opts.ServerName == "" {
		opts.ServerName = "trafficdirector.googleapis.com"
	}
	metadata, err := structpb.NewStruct(opts.Metadata)
	if err != nil {
		return nil, fmt.Errorf("write Envoy's bootstrap: node metadata: %w", err)
	}
	ads := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
	if opts.FetchTimeout > 0 {
		ads.InitialFetchTimeout = durationpb.New(opts.FetchTimeout)
	}
	cluster, err := xdsCluster(opts)
	if err != nil {
		return nil, err
	}
	b := &bootstrapv3.Bootstrap{
		Node: &corev3.Node{Id: opts.NodeID, Cluster: "cluster", Locality: &corev3.Locality{
			Zone: "us-central1-a"}, Metadata: metadata},
		Admin:           &bootstrapv3.Admin{Address: admin(opts)},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{cluster}},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			LdsConfig: ads, CdsConfig: ads,
			AdsConfig: &corev3.ApiConfigSource{
				ApiType: corev3.ApiConfigSource_GRPC, TransportApiVersion: corev3.ApiVersion_V3,
				GrpcServices: []*corev3.GrpcService{
					{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
						EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: xds}}}},
			},
		},
	}
	if opts.Runtime {
		const layer = "traffic_director_runtime"
		b.LayeredRuntime = &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name: "rtds_layer", LayerSpecifier: &bootstrapv3.RuntimeLayer_RtdsLayer_{
				RtdsLayer: &bootstrapv3.RuntimeLayer_RtdsLayer{Name: layer, RtdsConfig: ads}},
		}}}
	}
	out, err := protojson.MarshalOptions{UseProtoNames: true, Multiline: true}.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("write Envoy's bootstrap: %w", err)
	}
	return out, nil
}

func admin(opts EnvoyOptions) *corev3.Address {
	if opts.Container == nil {
		return socket(AdminAddr)
	}
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{
		Path: containerSocket, Mode: cmp.Or(opts.Container.SocketMode, 0o660)}}}
}

func packed(m proto.Message) (*anypb.Any, error) {
	a, err := anypb.New(m)
	if err != nil {
		return nil, fmt.Errorf("write Envoy's bootstrap: %w", err)
	}
	return a, nil
}

func socket(a netip.AddrPort) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: a.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{
			PortValue: uint32(a.Port())},
	}}}
}
