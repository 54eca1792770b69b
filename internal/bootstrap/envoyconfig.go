package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"path"
	"strconv"
	"strings"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// trafficDirector is the control plane's address.
const trafficDirector = "trafficdirector.googleapis.com:443"

// accessLogKey is the node's metadata that names the access log, where the attribute does.
const accessLogKey = "TRAFFICDIRECTOR_ACCESS_LOG_PATH"

// VM is what Envoy's node says of the machine.
type VM struct {
	Name, Zone    string // zone as in europe-west1-b
	IP            string // of the first NIC; IPv6 where it has no IPv4
	Network       string // name of the first NIC's VPC network
	ProjectNumber string
}

// readVM asks the metadata server.
func readVM(ctx context.Context) (VM, error) {
	var vm VM
	for _, want := range []struct {
		path string
		into *string
	}{
		{"instance/name", &vm.Name},
		{"instance/zone", &vm.Zone},                            // projects/N/zones/Z
		{"instance/network-interfaces/0/network", &vm.Network}, // projects/N/networks/X
		{"project/numeric-project-id", &vm.ProjectNumber},
	} {
		text, err := metadata.Read(ctx, want.path)
		if err != nil {
			return VM{}, err
		}
		*want.into = path.Base(strings.TrimSpace(string(text)))
		if *want.into == "." || *want.into == "/" {
			return VM{}, fmt.Errorf("read %q from the metadata server: it is empty", want.path)
		}
	}
	var err error
	vm.IP, err = readAddress(ctx)
	return vm, err
}

// readAddress asks for the first interface's address: the IPv4 one, or else, on an IPv6-only
// interface, the first IPv6 one.
func readAddress(ctx context.Context) (string, error) {
	const ipPath, ipv6Path = "instance/network-interfaces/0/ip", "instance/network-interfaces/0/ipv6s"
	for _, path := range []string{ipPath, ipv6Path} {
		text, err := metadata.Read(ctx, path)
		var status *metadata.Error
		if errors.As(err, &status) && status.Code == http.StatusNotFound {
			continue
		}
		if err != nil {
			return "", err
		}
		lines := strings.Fields(string(text))
		if len(lines) == 0 {
			continue
		}
		addr, err := netip.ParseAddr(lines[0])
		if err != nil {
			return "", fmt.Errorf("read %q from the metadata server: %w", path, err)
		}
		return addr.String(), nil
	}
	return "", fmt.Errorf("the VM has no address: the metadata server has neither %q nor %q",
		ipPath, ipv6Path)
}

// envoyConfig is Envoy's configuration in Traffic Director's form, as JSON: the same bytes for the
// same input, so that a difference means a restart. caFile is the VM's bundle of trusted
// authorities.
func envoyConfig(cfg attribute.Config, vm VM, caFile string) ([]byte, error) {
	node, err := envoyNode(cfg, vm)
	if err != nil {
		return nil, err
	}
	boot := &bootstrapv3.Bootstrap{
		Node:  node,
		Admin: &bootstrapv3.Admin{Address: loopback(attribute.EnvoyAdminPort)},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			LdsConfig: adsSource(), CdsConfig: adsSource(),
			AdsConfig: trafficDirectorAPI(caFile),
		},
		ClusterManager: &bootstrapv3.ClusterManager{LoadStatsConfig: trafficDirectorAPI(caFile)},
		LayeredRuntime: &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name: "rtds_layer",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_RtdsLayer_{
				RtdsLayer: &bootstrapv3.RuntimeLayer_RtdsLayer{
					Name: "traffic_director_runtime", RtdsConfig: adsSource()}},
		}}},
	}
	compact, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(boot)
	if err != nil {
		return nil, fmt.Errorf("encode Envoy's configuration: %w", err)
	}
	// protojson's own white space differs from build to build, on purpose.
	var text bytes.Buffer
	if err := json.Indent(&text, compact, "", "  "); err != nil {
		return nil, fmt.Errorf("encode Envoy's configuration: %w", err)
	}
	text.WriteByte('\n')
	return text.Bytes(), nil
}

// envoyNode is who Envoy says that it is, which decides what the control plane sends it.
// See docs/design/facts.md#gce-node.
func envoyNode(cfg attribute.Config, vm VM) (*corev3.Node, error) {
	project, network := vm.ProjectNumber, vm.Network
	if cfg.ProjectNumber != "" {
		project = cfg.ProjectNumber
	}
	if cfg.Network != "" {
		network = cfg.Network
	}
	scope := network
	switch {
	case cfg.Mesh != "":
		scope = "mesh:" + cfg.Mesh
	case cfg.Scope != "":
		scope = "scope:" + cfg.Scope
	}
	// Labels first: a label that bears the name of one of Traffic Director's own keys does not
	// replace it. All values are strings.
	meta := map[string]any{}
	for key, value := range cfg.Labels {
		meta[key] = value
	}
	meta["INSTANCE_IP"] = vm.IP
	meta["TRAFFICDIRECTOR_CLIENT_TYPE"] = "gce-managed-envoy"
	meta["TRAFFICDIRECTOR_INTERCEPTION_PORT"] = strconv.Itoa(int(cfg.ProxyPort))
	meta["TRAFFICDIRECTOR_NETWORK_NAME"] = network
	meta["TRAFFICDIRECTOR_GCP_PROJECT_NUMBER"] = project
	meta["TRAFFICDIRECTOR_ENABLE_TRACING"] = strconv.FormatBool(cfg.Tracing)
	if cfg.AccessLog != "" {
		meta[accessLogKey] = cfg.AccessLog
	}
	if len(cfg.ServingPorts) > 0 {
		ports := make([]string, len(cfg.ServingPorts))
		for i, port := range cfg.ServingPorts {
			ports[i] = strconv.Itoa(int(port))
		}
		meta["TRAFFICDIRECTOR_INBOUND_BACKEND_PORTS"] = strings.Join(ports, ",")
		meta["TRAFFICDIRECTOR_INBOUND_INTERCEPTION_PORT"] = strconv.Itoa(attribute.InboundPort)
	}
	fields, err := structpb.NewStruct(meta)
	if err != nil {
		return nil, fmt.Errorf("encode the labels: %w", err)
	}
	return &corev3.Node{
		Id: fmt.Sprintf("projects/%s/networks/%s/nodes/%s.%s.%s",
			project, scope, vm.Name, vm.Zone, vm.IP),
		Cluster:  "cluster",
		Locality: &corev3.Locality{Zone: vm.Zone},
		Metadata: fields,
	}, nil
}

func loopback(port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       "127.0.0.1",
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func adsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

// The parts of Envoy's gRPC client (google_grpc), by shorter names.
type (
	googleGrpc         = corev3.GrpcService_GoogleGrpc
	channelCredentials = corev3.GrpcService_GoogleGrpc_ChannelCredentials
	sslCredentials     = corev3.GrpcService_GoogleGrpc_ChannelCredentials_SslCredentials
	callCredentials    = corev3.GrpcService_GoogleGrpc_CallCredentials
	computeEngine      = corev3.GrpcService_GoogleGrpc_CallCredentials_GoogleComputeEngine
	channelArgs        = corev3.GrpcService_GoogleGrpc_ChannelArgs
	channelArg         = corev3.GrpcService_GoogleGrpc_ChannelArgs_Value
	channelArgInt      = corev3.GrpcService_GoogleGrpc_ChannelArgs_Value_IntValue
)

// trafficDirectorAPI is the stream to the control plane, authenticated by the VM's service account.
func trafficDirectorAPI(caFile string) *corev3.ApiConfigSource {
	number := func(n int64) *channelArg {
		return &channelArg{ValueSpecifier: &channelArgInt{IntValue: n}}
	}
	roots := &corev3.GrpcService_GoogleGrpc_SslCredentials{RootCerts: &corev3.DataSource{
		Specifier: &corev3.DataSource_Filename{Filename: caFile}}}
	stream := &googleGrpc{
		TargetUri:  trafficDirector,
		StatPrefix: "trafficdirector",
		ChannelCredentials: &channelCredentials{
			CredentialSpecifier: &sslCredentials{SslCredentials: roots}},
		CallCredentials: []*callCredentials{{
			CredentialSpecifier: &computeEngine{GoogleComputeEngine: &emptypb.Empty{}}}},
		ChannelArgs: &channelArgs{Args: map[string]*channelArg{
			// Pings go on while nothing is said: a dead peer is noticed in 30 s.
			"grpc.http2.max_pings_without_data": number(0),
			"grpc.keepalive_time_ms":            number(10_000),
			"grpc.keepalive_timeout_ms":         number(20_000),
		}},
	}
	return &corev3.ApiConfigSource{
		ApiType:             corev3.ApiConfigSource_GRPC,
		TransportApiVersion: corev3.ApiVersion_V3,
		GrpcServices: []*corev3.GrpcService{{
			TargetSpecifier: &corev3.GrpcService_GoogleGrpc_{GoogleGrpc: stream}}},
	}
}
