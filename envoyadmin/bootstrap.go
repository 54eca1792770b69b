package envoyadmin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
)

// Bootstrap is the part of the configuration that Envoy was started with that tells where its
// configuration comes from and as whom it asks. It never holds credentials: they are not read.
type Bootstrap struct {
	Node    Node
	Targets []Target // control planes, in Envoy's order, each once
	Admin   string   // "127.0.0.1:15000", or "unix:///path"
	// it takes listeners from a control plane or a file; else its static ones are all there are
	LDS bool
}

// Target is a control plane as Envoy reaches it.
type Target struct {
	Address    string // host:port; the host may be a name
	TLS        bool
	ServerName string // for TLS; empty: the host
	RootCAFile string // empty: the system's
	Cluster    string // the Envoy cluster that leads there, with envoy_grpc; empty with google_grpc
}

// The sections with masks (see maskSince) leave out all but the bootstrap, which Envoy still
// builds: rarely to be asked for.
const bootstrapPath = "/config_dump?mask=bootstrap"

// bootstrapJSON holds the fields of config.bootstrap.v3.Bootstrap that are read. The package of its
// type would bring in a great many others.
type (
	dynamicJSON struct {
		ADS     apiJSON  `json:"ads_config"`
		LDS     *ldsJSON `json:"lds_config"`
		Locator string   `json:"lds_resources_locator"` // of xdstp; instead of lds_config
		CDS     struct {
			API apiJSON `json:"api_config_source"`
		} `json:"cds_config"`
	}
	ldsJSON struct {
		API apiJSON `json:"api_config_source"`
	}
	apiJSON struct {
		Services []struct {
			Envoy struct {
				Cluster string `json:"cluster_name"`
			} `json:"envoy_grpc"`
			Google struct {
				Target      string `json:"target_uri"`
				Credentials *struct {
					SSL *struct {
						Roots struct {
							File string `json:"filename"`
						} `json:"root_certs"`
					} `json:"ssl_credentials"`
					Default *struct{} `json:"google_default"`
				} `json:"channel_credentials"`
			} `json:"google_grpc"`
		} `json:"grpc_services"`
		Clusters []string `json:"cluster_names"` // REST, and gRPC before 1.9
	}
	clusterJSON struct {
		Name   string `json:"name"`
		Assign struct {
			Endpoints []struct {
				LB []struct {
					Endpoint struct {
						Address addressJSON `json:"address"`
					} `json:"endpoint"`
				} `json:"lb_endpoints"`
			} `json:"endpoints"`
		} `json:"load_assignment"`
		Hosts  []addressJSON `json:"hosts"` // API v2
		Socket struct {
			Config tlsJSON `json:"typed_config"`
		} `json:"transport_socket"`
		TLS *tlsJSON `json:"tls_context"` // API v2
	}
	addressJSON struct {
		Socket struct {
			Address string `json:"address"`
			Port    uint32 `json:"port_value"`
		} `json:"socket_address"`
		Pipe struct {
			Path string `json:"path"`
		} `json:"pipe"`
	}
	tlsJSON struct {
		Type   string `json:"@type"`
		SNI    string `json:"sni"`
		Common struct {
			Validation struct {
				CA struct {
					File string `json:"filename"`
				} `json:"trusted_ca"`
			} `json:"validation_context"`
		} `json:"common_tls_context"`
	}
)

func (a addressJSON) String() string {
	if a.Pipe.Path != "" {
		return "unix://" + a.Pipe.Path
	}
	if a.Socket.Address == "" {
		return ""
	}
	return net.JoinHostPort(a.Socket.Address, strconv.FormatUint(uint64(a.Socket.Port), 10))
}

// Bootstrap asks what Envoy was started with. Envoy builds its whole dump for it (0.3 s and more at
// 10,000 services): ask once per process.
func (c *Client) Bootstrap(ctx context.Context) (*Bootstrap, error) {
	info, _, err := c.identify(ctx)
	if err != nil {
		return nil, err
	}
	path := bootstrapPath
	if info.Version != (Version{}) && info.Version.Less(maskSince) {
		path = everythingPath
	}
	var found *Bootstrap
	err = c.get(ctx, BootstrapQuestion, path, c.LongLimit, maxLong, func(body io.Reader) error {
		r := newReader(body)
		return r.document(func() error {
			return r.configs(func(r *reader) error {
				return r.object(func(name string) (err error) {
					if name != "bootstrap" {
						return r.skip()
					}
					found, err = r.bootstrap()
					return err
				})
			})
		})
	})
	if err == nil && found == nil {
		err = fmt.Errorf("get %q: %w: it has no bootstrap section", path, ErrNotJSON)
	}
	if err != nil {
		return nil, err
	}
	return found, nil
}

func (r *reader) bootstrap() (*Bootstrap, error) {
	var node nodeJSON
	var dynamic dynamicJSON
	var admin struct {
		Address addressJSON `json:"address"`
	}
	var clusters []clusterJSON
	err := r.object(func(name string) error {
		switch name {
		case "node":
			return r.into(&node)
		case "dynamic_resources":
			return r.into(&dynamic)
		case "admin":
			return r.into(&admin)
		case "static_resources":
			return r.object(func(name string) error {
				if name != "clusters" {
					return r.skip()
				}
				return r.array(func() error {
					var one clusterJSON
					err := r.into(&one)
					clusters = append(clusters, one)
					return err
				})
			})
		}
		return r.skip()
	})
	if err != nil {
		return nil, err
	}
	b := &Bootstrap{Node: node.node(), Admin: admin.Address.String(), LDS: dynamic.LDS != nil ||
		dynamic.Locator != ""}
	lds := cmp.Or(dynamic.LDS, &ldsJSON{})
	add := func(t Target) {
		if t.Address != "" && !slices.Contains(b.Targets, t) {
			b.Targets = append(b.Targets, t)
		}
	}
	for _, api := range []apiJSON{dynamic.ADS, lds.API, dynamic.CDS.API} {
		names := slices.Clone(api.Clusters)
		for _, service := range api.Services {
			if google := service.Google; google.Target != "" {
				t := Target{Address: targetAddress(google.Target)}
				if cred := google.Credentials; cred != nil && (cred.SSL != nil || cred.Default != nil) {
					t.TLS = true
					if cred.SSL != nil {
						t.RootCAFile = cred.SSL.Roots.File
					}
				}
				add(t)
			}
			names = append(names, service.Envoy.Cluster)
		}
		for _, cluster := range clusters {
			if cluster.Name == "" || !slices.Contains(names, cluster.Name) {
				continue
			}
			t := Target{Cluster: cluster.Name}
			if tls := cmp.Or(cluster.TLS, &cluster.Socket.Config); cluster.TLS != nil ||
				strings.HasSuffix(tls.Type, "UpstreamTlsContext") {
				t.TLS, t.ServerName, t.RootCAFile = true, tls.SNI, tls.Common.Validation.CA.File
			}
			addresses := slices.Clone(cluster.Hosts)
			for _, locality := range cluster.Assign.Endpoints {
				for _, lb := range locality.LB {
					addresses = append(addresses, lb.Endpoint.Address)
				}
			}
			for _, a := range addresses {
				t.Address = a.String()
				add(t)
			}
		}
	}
	return b, nil
}

// into reads a value into a Go value. Other types of a field than expected are a shape error.
func (r *reader) into(v any) error {
	depth, offset := r.StackDepth(), r.InputOffset()
	err := json.UnmarshalDecode(r.Decoder, v)
	var semantic *json.SemanticError
	if !errors.As(err, &semantic) {
		return err
	}
	// The decoder may stand within the value. Read on to its end.
	for r.StackDepth() > depth {
		if err := r.open(); err != nil {
			return err
		}
	}
	if r.InputOffset() == offset {
		if err := r.skip(); err != nil {
			return err
		}
	}
	return &shapeError{err.Error()}
}

// targetAddress is the host:port of a gRPC target: "trafficdirector.googleapis.com:443",
// "dns:///…", "dns://RESOLVER/…", "ipv4:…". gRPC's default port is 443.
func targetAddress(uri string) string {
	if strings.HasPrefix(uri, "unix:") {
		return uri
	}
	for _, scheme := range []string{"dns:", "ipv4:", "ipv6:"} {
		if rest, ok := strings.CutPrefix(uri, scheme); ok {
			uri = rest
			if rest, ok := strings.CutPrefix(uri, "//"); ok {
				_, uri, _ = strings.Cut(rest, "/")
			}
			break
		}
	}
	if _, _, err := net.SplitHostPort(uri); err != nil {
		return net.JoinHostPort(strings.Trim(uri, "[]"), "443")
	}
	return uri
}
