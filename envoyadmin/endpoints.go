package envoyadmin

import (
	"context"
	"io"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
)

// Endpoint is one of a cluster's.
type Endpoint struct {
	Address string // "10.0.0.1:80", "unix:///path"; "" where Envoy does not say
	Health  Health
}

// ClusterEndpoints are those of one cluster.
type ClusterEndpoints struct {
	ClusterHealth
	First []Endpoint // the first maxEndpoints that are not healthy, and then others
}

// maxEndpoints is how many endpoints of a cluster are told one by one.
const maxEndpoints = 10

// Endpoints asks for the endpoints of some clusters, in their order; one that Envoy does not have
// is left out. Envoy tells those of all clusters: see Clusters for what that costs.
func (c *Client) Endpoints(ctx context.Context, clusters ...string) ([]ClusterEndpoints, error) {
	if len(clusters) == 0 {
		return nil, nil
	}
	place := placesOf(clusters)
	var found []ClusterEndpoints
	err := c.get(ctx, ClustersQuestion, "/clusters?format=json", c.LongLimit, maxLong,
		func(body io.Reader) error {
			r := newReader(body)
			return r.document(func() error {
				var known, other bool
				err := r.object(func(name string) error {
					if name != "cluster_statuses" {
						other = true
						return r.skip()
					}
					known = true
					return r.array(func() error {
						one, err := r.endpoints(place)
						if _, asked := place[one.Name]; asked {
							found = append(found, one)
						}
						return err
					})
				})
				if err == nil && other && !known {
					return &shapeError{"there is no cluster_statuses in it"}
				}
				return err
			})
		})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(found, func(a, b ClusterEndpoints) int {
		return place[a.Name] - place[b.Name]
	})
	return found, nil
}

// placesOf are the places of names in their list, the first of each.
func placesOf(names []string) map[string]int {
	place := make(map[string]int, len(names))
	for i, name := range slices.Backward(names) {
		place[name] = i
	}
	return place
}

// endpoints reads an element of cluster_statuses. The name comes before the hosts: those of a
// cluster that is not asked for are skipped.
func (r *reader) endpoints(clusters map[string]int) (one ClusterEndpoints, err error) {
	var well []Endpoint
	err = r.object(func(name string) error {
		_, asked := clusters[one.Name]
		switch {
		case name == "name":
			return r.textInto(&one.Name)
		case name == "host_statuses" && asked:
			return r.array(func() error {
				e, err := r.endpoint()
				one.count(e.Health)
				switch {
				case e.Health != Healthy && len(one.First) < maxEndpoints:
					one.First = append(one.First, e)
				case e.Health == Healthy && len(well) < maxEndpoints:
					well = append(well, e)
				}
				return err
			})
		}
		return r.skip()
	})
	one.First = append(one.First, well[:min(len(well), maxEndpoints-len(one.First))]...)
	return one, err
}

// endpoint reads an element of host_statuses.
func (r *reader) endpoint() (e Endpoint, err error) {
	e.Health = Healthy
	err = r.object(func(name string) (err error) {
		switch name {
		case "address":
			e.Address, err = r.socketAddress()
			return err
		case "health_status":
			e.Health, err = r.health()
			return err
		}
		return r.skip()
	})
	return e, err
}

// socketAddress reads a config.core.v3.Address.
func (r *reader) socketAddress() (text string, err error) {
	address := struct {
		Socket struct {
			Address string `json:"address"`
			Port    uint32 `json:"port_value"`
		} `json:"socket_address"`
		Pipe struct {
			Path string `json:"path"`
		} `json:"pipe"`
	}{}
	if err := r.into(&address); err != nil {
		return "", err
	}
	switch {
	case address.Pipe.Path != "":
		return "unix://" + cut(address.Pipe.Path), nil
	case address.Socket.Address != "":
		return net.JoinHostPort(cut(address.Socket.Address),
			strconv.FormatUint(uint64(address.Socket.Port), 10)), nil
	}
	return "", nil
}

// maxText is how much of a name is kept where many may come.
const maxText = 1 << 10

func cut(s string) string { return s[:min(len(s), maxText)] }

// Routes is a route configuration, as far as it says who is behind an HTTP listener.
type Routes struct {
	Name, Version string
	Hosts         []VirtualHost // the first maxHosts
	Count         int           // of virtual hosts
}

// VirtualHost is a part of a route configuration: for requests to some names.
type VirtualHost struct {
	Name     string
	Domains  []string // the first maxDomains, of DomainCount
	Clusters []string // the first maxRouted, of ClusterCount, each once
	// DomainCount and ClusterCount are of all. A cluster that a header names is not among them.
	DomainCount, ClusterCount int
	ByHeader                  bool // a request's header says which cluster
}

// What of a route configuration is told one by one.
const (
	maxHosts   = 50
	maxDomains = 5
	maxRouted  = 20
)

// Routes asks for a route configuration by its name: what the control plane has sent, else what
// stands in a listener. ok is false where Envoy has none of that name.
func (c *Client) Routes(ctx context.Context, name string) (routes Routes, ok bool, err error) {
	filter := ""
	if len(name) <= maxText {
		// An Envoy that does not know name_regex tells all.
		filter = "&name_regex=" + url.QueryEscape(regexp.QuoteMeta(name))
	}
	all, err := c.routes(ctx, filter, []string{name})
	if len(all) == 0 {
		return Routes{}, false, err
	}
	return all[0], true, err
}

// RoutesOf asks for some route configurations, in their order; one that Envoy does not have is left
// out. Envoy tells all that it has, by two dumps: many for which it is asked one by one would cost
// it more.
func (c *Client) RoutesOf(ctx context.Context, names ...string) ([]Routes, error) {
	if len(names) == 0 {
		return nil, nil
	}
	return c.routes(ctx, "", names)
}

func (c *Client) routes(ctx context.Context, filter string, names []string) ([]Routes, error) {
	place, seen := placesOf(names), map[string]bool{}
	var found []Routes
	var err error
	for _, kind := range []string{"dynamic", "static"} {
		path := "/config_dump?resource=" + kind + "_route_configs" + filter
		err = c.get(ctx, DumpQuestion, path, c.LongLimit, maxLong, func(body io.Reader) error {
			r := newReader(body)
			return r.document(func() error {
				return r.configs(func(r *reader) error {
					one, err := r.routeEntry()
					_, asked := place[one.Name]
					if asked && !seen[one.Name] && (err == nil || isShape(err)) {
						found, seen[one.Name] = append(found, one), true
					}
					return err
				})
			})
		})
		if err != nil || len(found) == len(place) {
			break
		}
	}
	slices.SortFunc(found, func(a, b Routes) int { return place[a.Name] - place[b.Name] })
	return found, err
}

// routeEntry reads an element of dynamic_route_configs or static_route_configs.
func (r *reader) routeEntry() (routes Routes, err error) {
	var version string
	err = r.object(func(name string) error {
		switch name {
		case "version_info":
			return r.textInto(&version)
		case "route_config":
			routes, err = r.routeConfig()
			return err
		}
		return r.skip()
	})
	routes.Version = cut(version)
	return routes, err
}

func (r *reader) routeConfig() (routes Routes, err error) {
	err = r.object(func(name string) error {
		switch name {
		case "name":
			return r.textInto(&routes.Name)
		case "virtual_hosts":
			return r.array(func() error {
				if routes.Count++; routes.Count > maxHosts {
					return r.skip()
				}
				host, err := r.virtualHost()
				routes.Hosts = append(routes.Hosts, host)
				return err
			})
		}
		return r.skip()
	})
	return routes, err
}

func (r *reader) virtualHost() (host VirtualHost, err error) {
	clusters := map[string]bool{}
	cluster := func() error {
		name, err := r.text()
		if err == nil && name != "" && !clusters[name] && host.ClusterCount < maxHosts*maxRouted {
			clusters[name] = true
			if host.ClusterCount++; host.ClusterCount <= maxRouted {
				host.Clusters = append(host.Clusters, cut(name))
			}
		}
		return err
	}
	err = r.object(func(name string) error {
		switch name {
		case "name":
			name, err := r.text()
			host.Name = cut(name)
			return err
		case "domains":
			return r.array(func() error {
				domain, err := r.text()
				if host.DomainCount++; host.DomainCount <= maxDomains {
					host.Domains = append(host.Domains, cut(domain))
				}
				return err
			})
		case "routes":
			return r.array(func() error {
				return r.object(func(name string) error {
					if name == "route" {
						return r.routeAction(cluster, &host.ByHeader)
					}
					return r.skip()
				})
			})
		}
		return r.skip()
	})
	return host, err
}

// routeAction reads a config.route.v3.RouteAction.
func (r *reader) routeAction(cluster func() error, byHeader *bool) error {
	return r.object(func(name string) error {
		switch name {
		case "cluster":
			return cluster()
		case "cluster_header":
			*byHeader = true
			return r.skip()
		case "weighted_clusters":
			return r.object(func(name string) error {
				if name != "clusters" {
					return r.skip()
				}
				return r.array(func() error {
					return r.object(func(name string) error {
						switch name {
						case "name":
							return cluster()
						case "cluster_header":
							*byHeader = true
						}
						return r.skip()
					})
				})
			})
		}
		return r.skip()
	})
}
