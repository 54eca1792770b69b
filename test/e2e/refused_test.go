//go:build lab

package e2e

import (
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
)

// quotedListener is a listener that Envoy refuses for a header that it adds, whose value it quotes.
func quotedListener(t *testing.T, name string, port uint16, value string) *listenerv3.Listener {
	pack := func(m proto.Message) *anypb.Any {
		packed, err := anypb.New(m)
		must(t, err)
		return packed
	}
	route := &routev3.Route{
		Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_Route{
			Route: &routev3.RouteAction{
				ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "cluster-web"}}},
		RequestHeadersToAdd: []*corev3.HeaderValueOption{{
			Header: &corev3.HeaderValue{Key: "authorization", Value: value}, AppendAction: 99,
		}},
	}
	l := controlplane.RefusedListener(name, port, "")
	l.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
		Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{
			TypedConfig: pack(&hcmv3.HttpConnectionManager{
				StatPrefix: "x",
				HttpFilters: []*hcmv3.HttpFilter{
					{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{})}}},
				RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{
					RouteConfig: &routev3.RouteConfiguration{
						Name: "r", VirtualHosts: []*routev3.VirtualHost{
							{Name: "v", Domains: []string{"*"}, Routes: []*routev3.Route{route}}},
					}},
			})},
	}}}}
	return l
}
