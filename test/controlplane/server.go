// Package controlplane is an xDS control plane for tests, with listeners in Traffic Director's
// shape. A test says in the domain's words what the mesh looks like (Config), pushes it (Set),
// reads who connected (Nodes) and what Envoy said to it (Accepted, Rejections), and chooses how
// the control plane misbehaves: refuse streams with Traffic Director's own words (Refuse), go
// silent (Hang), go away and come back on the same address (GoAway, ComeBack), stand still (Pause,
// Continue), send a refused listener again and again (Storm), or send a listener that Envoy
// refuses (RefusedListener).
//
// It serves ADS (state of the world) with CDS, LDS, RDS and RTDS, and LRS, whose reports it drops.
// It knows no incremental xDS, no EDS (endpoints stand in the clusters), and gives every node the
// same answer. Streams are answered by go-control-plane's snapshot cache.
//
// test/lab starts the Envoy that connects here.
package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadstatsv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// connectTimeout is what clusters give an endpoint to accept: short, since every endpoint of
// a test is a veth away.
const connectTimeout = 2 * time.Second

// everyone is the one node id in the snapshot cache: every node gets the same answer.
const everyone = "everyone"

type sameForAll struct{}

func (sameForAll) ID(*corev3.Node) string { return everyone }

// Options of a control plane.
type Options struct {
	// Listen opens the listening socket. It is called by Start and by each ComeBack, and must give the
	// same address each time.
	Listen func() (net.Listener, error)
	// Certificate, when set, makes the control plane speak TLS.
	Certificate *tls.Certificate
}

// Server is a control plane. Its methods may be called from several goroutines.
type Server struct {
	opts     Options
	cache    cachev3.SnapshotCache
	inner    sotw.Server
	stop     context.CancelFunc
	mu       sync.Mutex
	grpc     *grpc.Server // nil: away
	addr     net.Addr
	versions map[string]uint64 // by type URL
	sent     map[string]map[string]types.Resource
	mode     mode
	storm    bool
	paused   chan struct{} // closed by Continue; nil: not paused
	changed  chan struct{} // closed and replaced whenever mode, nodes, accepted or rejections change
	nodes    []Node
	streams  []*stream         // that are open, oldest first
	accepted map[string]string // type URL -> version, as the last ACK had it
	rejected []Rejection
	refusals int // of which rejected holds the first
	reports  int
}

// mode is how streams are treated.
type mode struct {
	refuse *status.Status // end every stream with it
	hang   bool           // answer nothing
}

// Node is one ADS stream's introduction, as the first request and the stream's headers had it.
type Node struct {
	At                time.Time
	ID, Cluster       string
	Zone              string // locality.zone
	Metadata          map[string]any
	UserAgentVersion  string // Envoy's version: "1.40.0"
	Authorization     string // the authorization header's value; empty: none was sent
	Peer              string
	GoogleUserProject string // x-goog-user-project, if any
}

// Rejection is one NACK.
type Rejection struct {
	At      time.Time
	TypeURL string
	Version string // the version that was refused
	Details string
}

// New makes a control plane that has nothing configured: until the first Set it answers no request
// but takes streams. Call Start.
func New(opts Options) *Server {
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{
		opts:     opts,
		cache:    cachev3.NewSnapshotCache(true, sameForAll{}, nil),
		stop:     stop,
		versions: make(map[string]uint64),
		sent:     make(map[string]map[string]types.Resource),
		changed:  make(chan struct{}),
		accepted: make(map[string]string),
	}
	// Ordered: clusters before the routes and listeners that name them, so that an
	// unchanged service sees no gap.
	s.inner = sotw.NewServer(ctx, s.cache, nil, sotw.WithOrderedADS())
	return s
}

// Start listens and serves.
func (s *Server) Start() error { return s.ComeBack() }

// Addr is the address that was listened on last.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addr
}

// Close ends every stream and stops for good.
func (s *Server) Close() {
	s.stop()
	s.Continue()
	s.GoAway()
}

// GoAway closes the listening socket and every connection: the address refuses
// connections from here on.
func (s *Server) GoAway() {
	s.mu.Lock()
	g := s.grpc
	s.grpc = nil
	s.mu.Unlock()
	if g != nil {
		g.Stop()
	}
}

// ComeBack listens again after GoAway.
func (s *Server) ComeBack() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.grpc != nil {
		return errors.New("control plane is already serving")
	}
	ln, err := s.opts.Listen()
	// A program that is being started has the closed socket until its exec, which may take a while.
	for began := time.Now(); errors.Is(err, syscall.EADDRINUSE) && time.Since(began) < 5*time.Second; {
		time.Sleep(20 * time.Millisecond)
		ln, err = s.opts.Listen()
	}
	if err != nil {
		return fmt.Errorf("listen for xDS: %w", err)
	}
	var options []grpc.ServerOption
	if s.opts.Certificate != nil {
		options = append(options, grpc.Creds(credentials.NewServerTLSFromCert(s.opts.Certificate)))
	}
	// 10,000 HTTP chains are 20 MB; requests list as many route names.
	options = append(options, grpc.MaxSendMsgSize(1<<30), grpc.MaxRecvMsgSize(1<<28))
	s.grpc = grpc.NewServer(options...)
	s.addr = ln.Addr()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s.grpc, ads{s: s})
	loadstatsv3.RegisterLoadReportingServiceServer(s.grpc, lrs{s: s})
	go s.grpc.Serve(&pausing{Listener: ln, s: s}) // ends by Stop
	return nil
}

// Pause does to every connection, present and future, what SIGSTOP of the process would: the kernel
// goes on accepting and acknowledging, and nothing is read or written. Continue undoes it.
func (s *Server) Pause() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.paused == nil {
		s.paused = make(chan struct{})
	}
}

// Continue undoes Pause.
func (s *Server) Continue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.paused != nil {
		close(s.paused)
		s.paused = nil
	}
}

// running blocks while the control plane is paused, or until gone is closed.
func (s *Server) running(gone <-chan struct{}) {
	s.mu.Lock()
	paused := s.paused
	s.mu.Unlock()
	if paused != nil {
		select {
		case <-paused:
		case <-gone:
		}
	}
}

// pausing is a listener whose connections stand still while the control plane is paused. They end
// with it: gRPC would wait for the ones that stand still in their handshake.
type pausing struct {
	net.Listener
	s     *Server
	mu    sync.Mutex
	conns []*pausingConn
}

func (p *pausing) Accept() (net.Conn, error) {
	conn, err := p.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &pausingConn{Conn: conn, s: p.s, gone: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, c)
	return c, nil
}

func (p *pausing) Close() error {
	err := p.Listener.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	return err
}

type pausingConn struct {
	net.Conn
	s    *Server
	once sync.Once
	gone chan struct{}
}

func (c *pausingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.s.running(c.gone) // what came in the meantime is read when the process goes on
	return n, err
}

func (c *pausingConn) Write(b []byte) (int, error) {
	c.s.running(c.gone)
	return c.Conn.Write(b)
}

func (c *pausingConn) Close() error {
	c.once.Do(func() { close(c.gone) })
	return c.Conn.Close()
}

// Push is what Set published.
type Push struct {
	At        time.Time // just before the first watch was answered
	Listeners string    // the version of the listeners; unchanged if they did not change
	Changed   []string  // type URLs whose resources changed
}

// Set publishes cfg to every stream. A type of resource whose content did not change keeps its
// version and is not sent again, as with Traffic Director.
func (s *Server) Set(cfg Config) (Push, error) {
	byType, err := cfg.resources()
	if err != nil {
		return Push{}, fmt.Errorf("compile mesh: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	snapshot := &cachev3.Snapshot{}
	push := Push{}
	for _, typeURL := range slices.Sorted(maps.Keys(byType)) {
		items := make(map[string]types.Resource, len(byType[typeURL]))
		for _, r := range byType[typeURL] {
			items[cachev3.GetResourceName(r)] = r
		}
		if len(items) != len(byType[typeURL]) {
			return Push{}, fmt.Errorf("compile mesh: two resources of type %s with the same name", typeURL)
		}
		if old, ok := s.sent[typeURL]; !ok || !same(old, items) {
			s.versions[typeURL]++
			push.Changed = append(push.Changed, typeURL)
			// Kept as copies, since the caller may go on changing its own listeners.
			s.sent[typeURL] = clone(items)
		}
		snapshot.Resources[cachev3.GetResponseType(typeURL)] = cachev3.NewResources(
			s.version(typeURL), slices.Collect(maps.Values(s.sent[typeURL])))
	}
	push.Listeners = s.version(resourcev3.ListenerType)
	push.At = time.Now()
	if err := s.cache.SetSnapshot(context.Background(), everyone, snapshot); err != nil {
		return Push{}, fmt.Errorf("publish snapshot: %w", err)
	}
	return push, nil
}

func (s *Server) version(typeURL string) string {
	return strconv.FormatUint(s.versions[typeURL], 10)
}

func same(a, b map[string]types.Resource) bool {
	return maps.EqualFunc(a, b, func(x, y types.Resource) bool { return proto.Equal(x, y) })
}

func clone(in map[string]types.Resource) map[string]types.Resource {
	out := make(map[string]types.Resource, len(in))
	for name, r := range in {
		out[name] = proto.Clone(r)
	}
	return out
}

// Serve answers as usual again after Refuse or Hang. Streams that hang go on; refused ones come
// again by Envoy's own back-off (0.5 to 30 s).
func (s *Server) Serve() { s.set(mode{}) }

// Refuse ends every stream, present and future, with a status.
func (s *Server) Refuse(code codes.Code, message string) {
	s.set(mode{refuse: status.New(code, message)})
}

// Traffic Director's own words for what a VM gets wrong, as in its
// documentation and in users' logs.
func (s *Server) RefuseNotFound(network, project string) {
	s.Refuse(codes.NotFound,
		fmt.Sprintf("Traffic Director configuration was not found for network %q in project %q.",
			network, project))
}

// RefuseUnknownEntity is what a wrong mesh or scope name gets.
func (s *Server) RefuseUnknownEntity() {
	s.Refuse(codes.NotFound, "Requested entity was not found.")
}

// RefusePermission is what a service account without roles/trafficdirector.client gets.
func (s *Server) RefusePermission() {
	s.Refuse(codes.PermissionDenied, "Permission denied on resource project (or it may not exist).")
}

// RefuseDisabled is what a project without the API gets.
func (s *Server) RefuseDisabled(project string) {
	s.Refuse(codes.PermissionDenied, fmt.Sprintf(
		"Traffic Director API has not been used in project %s before or it is disabled. Enable it by "+
			"visiting https://console.developers.google.com/apis/api/"+
			"trafficdirector.googleapis.com/overview?project=%s then retry.", project, project))
}

// Hang leaves streams open and new ones unanswered.
func (s *Server) Hang() { s.set(mode{hang: true}) }

// Storm chooses what follows a NACK: sent again at once and for ever (on), as a control plane does
// that takes a NACK for a request, or not before the next Set (off, the default, as Traffic
// Director). Storms were seen at 1,300 rejections a second. It counts from the next NACK on.
func (s *Server) Storm(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.storm = on
}

func (s *Server) set(m mode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode = m
	s.notify()
}

// notify wakes those who wait for a change; s.mu is held.
func (s *Server) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Nodes lists every ADS stream that introduced itself, oldest first.
func (s *Server) Nodes() []Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.nodes)
}

// Rejections lists the NACKs, oldest first; of a storm only the first 10,000.
func (s *Server) Rejections() []Rejection {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.rejected)
}

// Refusals is how many NACKs came in all.
func (s *Server) Refusals() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refusals
}

// LoadReports is how many load reports came.
func (s *Server) LoadReports() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reports
}

// wait blocks until a condition on the control plane holds, looking at each change.
func (s *Server) wait(ctx context.Context, what string, holds func() bool) error {
	for {
		s.mu.Lock()
		ok, changed := holds(), s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		}
	}
}

// WaitAccepted blocks until an Envoy has accepted the listeners of a push (or newer ones).
func (s *Server) WaitAccepted(ctx context.Context, p Push) error {
	want, err := strconv.ParseUint(p.Listeners, 10, 64)
	if err != nil {
		return fmt.Errorf("wait for push: %w", err)
	}
	return s.wait(ctx, "Envoy to accept listeners of version "+p.Listeners, func() bool {
		got, err := strconv.ParseUint(s.accepted[resourcev3.ListenerType], 10, 64)
		return err == nil && got >= want
	})
}

// Answered says whether the Envoy that connected last, after since, has taken or refused the
// listeners of a push, or newer ones. One whose stream has ended counts no more.
func (s *Server) Answered(since time.Time, p Push) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.streams) == 0 {
		return false
	}
	newest := s.streams[len(s.streams)-1]
	want, err := strconv.ParseUint(p.Listeners, 10, 64)
	if err != nil {
		return false
	}
	got, err := strconv.ParseUint(newest.answered[resourcev3.ListenerType], 10, 64)
	return err == nil && got >= want && newest.began.After(since)
}

// Connected is when the Envoy connected that did so last; zero: none is.
func (s *Server) Connected() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.streams) == 0 {
		return time.Time{}
	}
	return s.streams[len(s.streams)-1].began
}

// WaitRejected blocks until n NACKs have been seen in all.
func (s *Server) WaitRejected(ctx context.Context, n int) error {
	return s.wait(ctx, fmt.Sprintf("%d rejections", n), func() bool { return len(s.rejected) >= n })
}

// WaitNodes blocks until n streams have introduced themselves in all.
func (s *Server) WaitNodes(ctx context.Context, n int) error {
	return s.wait(ctx, fmt.Sprintf("%d streams", n), func() bool { return len(s.nodes) >= n })
}

// ads is the stream handler: it stands before go-control-plane's own, records, and
// does the misbehaving.
type ads struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	s *Server
}

func (a ads) StreamAggregatedResources(
	grpcStream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	st := &stream{AggregatedDiscoveryService_StreamAggregatedResourcesServer: grpcStream, s: a.s,
		last: make(map[string]answer), answered: make(map[string]string), began: time.Now()}
	a.s.mu.Lock()
	a.s.streams = append(a.s.streams, st)
	a.s.mu.Unlock()
	defer func() {
		a.s.mu.Lock()
		defer a.s.mu.Unlock()
		a.s.streams = slices.DeleteFunc(a.s.streams, func(x *stream) bool { return x == st })
	}()
	ended := make(chan error, 1)
	// The inner handler ends by itself once this one has returned: gRPC then cancels the
	// stream, and its Recv fails.
	go func() { ended <- a.s.inner.StreamHandler(st, resourcev3.AnyType) }()
	for {
		a.s.mu.Lock()
		// A stream is refused after it has introduced itself: the real one reads the node before
		// it knows the network.
		m, changed, introduced := a.s.mode, a.s.changed, st.introduced
		a.s.mu.Unlock()
		if m.refuse != nil && introduced {
			return m.refuse.Err()
		}
		select {
		case err := <-ended:
			return err
		case <-changed:
		}
	}
}

// stream sees what passes between Envoy and the snapshot cache.
type stream struct {
	discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer
	s          *Server
	began      time.Time
	introduced bool              // guarded by s.mu
	last       map[string]answer // by type URL, guarded by s.mu
	// answered are the versions that were taken or refused, by type URL; guarded by s.mu
	answered map[string]string
}

// answer is the last one sent of a type.
type answer struct{ nonce, version string }

func (st *stream) Recv() (*discoveryv3.DiscoveryRequest, error) {
	req, err := st.AggregatedDiscoveryService_StreamAggregatedResourcesServer.Recv()
	if err != nil {
		return nil, err
	}
	st.s.mu.Lock()
	defer st.s.mu.Unlock()
	if !st.introduced {
		st.introduced = true
		st.s.nodes = append(st.s.nodes, introduction(st.Context(), req.GetNode()))
		st.s.notify()
	}
	last, answered := st.last[req.GetTypeUrl()]
	if answered && req.GetResponseNonce() == last.nonce {
		st.answered[req.GetTypeUrl()] = last.version
	}
	switch {
	case !answered || req.GetResponseNonce() != last.nonce:
		// a first request, or one that crossed an answer
	case req.GetErrorDetail() != nil:
		st.s.refusals++
		if len(st.s.rejected) < 10_000 {
			st.s.rejected = append(st.s.rejected, Rejection{
				At: time.Now(), TypeURL: req.GetTypeUrl(), Version: last.version,
				Details: req.GetErrorDetail().GetMessage(),
			})
			st.s.notify()
		}
		if !st.s.storm {
			// The cache compares this with its own version, and answers at once when they differ.
			req.VersionInfo = last.version
		}
	default:
		st.s.accepted[req.GetTypeUrl()] = req.GetVersionInfo()
		st.s.notify()
	}
	return req, nil
}

func (st *stream) Send(resp *discoveryv3.DiscoveryResponse) error {
	if err := st.s.wait(st.Context(), "end of hang", func() bool {
		return !st.s.mode.hang
	}); err != nil {
		return err
	}
	st.s.mu.Lock()
	st.last[resp.GetTypeUrl()] = answer{nonce: resp.GetNonce(), version: resp.GetVersionInfo()}
	refused := st.s.mode.refuse
	st.s.mu.Unlock()
	if refused != nil {
		return refused.Err()
	}
	return st.AggregatedDiscoveryService_StreamAggregatedResourcesServer.Send(resp)
}

func introduction(ctx context.Context, node *corev3.Node) Node {
	n := Node{
		At:       time.Now(),
		ID:       node.GetId(),
		Cluster:  node.GetCluster(),
		Zone:     node.GetLocality().GetZone(),
		Metadata: node.GetMetadata().AsMap(),
	}
	if v := node.GetUserAgentBuildVersion().GetVersion(); v != nil {
		n.UserAgentVersion = fmt.Sprintf("%d.%d.%d", v.GetMajorNumber(), v.GetMinorNumber(), v.GetPatch())
	}
	if p, ok := peer.FromContext(ctx); ok {
		n.Peer = p.Addr.String()
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		n.Authorization = first(md.Get("authorization"))
		n.GoogleUserProject = first(md.Get("x-goog-user-project"))
	}
	return n
}

func first(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

// lrs takes load reports and drops them.
type lrs struct {
	loadstatsv3.UnimplementedLoadReportingServiceServer
	s *Server
}

func (l lrs) StreamLoadStats(stream loadstatsv3.LoadReportingService_StreamLoadStatsServer) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil // the client is gone
		}
		l.s.mu.Lock()
		l.s.reports++
		l.s.mu.Unlock()
	}
}
