package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// lookSchema names the form of a recorded look. Fields may be added to it. One of Facts is not
// renamed or removed: see addedFields.
const lookSchema = "service-proxy-agent/look/v1"

// recorded is a look that was written down: Facts for doctor, the rest for explain. Of Envoy's
// configuration it has what leads to endpoints: names, addresses, ports, health. No header, no
// token and no query of a URL is among that.
type recorded struct {
	Schema  string    `json:"schema"`
	Version string    `json:"version"` // of the agent that looked
	Commit  string    `json:"commit"`
	Time    time.Time `json:"time"` // of the look, UTC
	// Kinds are the kinds of findings that it knew, and Fields those of Facts.
	Kinds  []symptom.ID  `json:"kinds"`
	Fields []string      `json:"fields"`
	Facts  symptom.Facts `json:"facts"`

	Backend  string            `json:"backend"`
	Known    bool              `json:"known"` // it is known what is wanted
	Families [2]recordedFamily `json:"families"`
	Refused  []symptom.Refusal `json:"refused"`
	Daemon   *recordedDaemon   `json:"daemon"` // nil: none answered

	Envoy recordedEnvoy `json:"envoy"`

	Ways    route.Map `json:"ways"`
	WaysErr error     `json:"ways_error"`

	User   userID            `json:"proxy_user"`
	Users  map[string]userID `json:"users"` // by name, of those whom rules are about
	Groups map[string]uint32 `json:"groups"`
}

// recordedFamily is one family's table, and what it should be.
type recordedFamily struct {
	Rules    []string              `json:"rules"` // as `iptables-save -c -t nat` prints them
	RulesErr error                 `json:"rules_error"`
	CountErr error                 `json:"count_error"` // why counters are missing
	Want     []string              `json:"want"`        // as Ruleset.String
	Asked    iptables.Interception `json:"asked"`
	Served   []Served              `json:"served"`

	// Rules and Want, read.
	table    iptables.Table
	counters iptables.Counters
	want     iptables.Ruleset
}

// recordedDaemon is what the daemon said of the rules.
type recordedDaemon struct {
	Mode     string `json:"mode"`
	NotReady string `json:"not_ready"`
}

// recordedEnvoy is what Envoy does with a connection.
type recordedEnvoy struct {
	Err        error                 `json:"error"`
	Configured bool                  `json:"configured"`
	Listeners  []envoyadmin.Listener `json:"listeners"`

	// The routes and clusters of all chains; the errors say why some are missing.
	Routes    []envoyadmin.Routes           `json:"routes"`
	RoutesErr error                         `json:"routes_error"`
	Clusters  []envoyadmin.ClusterEndpoints `json:"clusters"`
	// ClustersErr is nil where a cluster that is missing is one that Envoy does not have.
	ClustersErr error `json:"clusters_error"`
}

// userID is a user in numbers.
type userID struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

var errNotRecorded = errors.New("it is not in the recording")

func (r *recorded) want(family int) iptables.Ruleset { return r.Families[family].want }

func (r *recorded) wayTo(to netip.AddrPort) (route.Way, error) {
	way, known := r.Ways.To(to.Addr())
	switch {
	case known:
		return way, nil
	case r.WaysErr != nil:
		return way, r.WaysErr
	}
	return way, errNotRecorded
}

func (r *recorded) countersOf(f iptables.Family, steps []iptables.Step) (
	[]iptables.Counter, error) {
	for i, family := range families {
		if family == f {
			counters, err := r.Families[i].counters.Of(steps)
			if r.Families[i].CountErr != nil {
				err = r.Families[i].CountErr
			}
			return counters, err
		}
	}
	return nil, errNotRecorded
}

// Routes is as envoyadmin.Client has it.
func (r *recorded) Routes(_ context.Context, name string) (envoyadmin.Routes, bool, error) {
	for _, one := range r.Envoy.Routes {
		if one.Name == name {
			return one, true, nil
		}
	}
	return envoyadmin.Routes{}, false, r.Envoy.RoutesErr
}

// Endpoints is as envoyadmin.Client has it.
func (r *recorded) Endpoints(_ context.Context, names ...string) ([]envoyadmin.ClusterEndpoints,
	error) {
	var found []envoyadmin.ClusterEndpoints
	for _, name := range names {
		for _, one := range r.Envoy.Clusters {
			if one.Name == name {
				found = append(found, one)
				break
			}
		}
	}
	if len(found) < len(names) {
		return found, r.Envoy.ClustersErr
	}
	return found, nil
}

func (r *recorded) userIDs(name string) (uid, gid uint32, err error) {
	if id, known := r.Users[name]; known {
		return id.UID, id.GID, nil
	}
	n, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("user %q is not in the recording, which has %v alone: give a number",
			symptom.Printable(name, 64), named(r.Users))
	}
	for _, id := range r.Users {
		if id.UID == uint32(n) {
			return id.UID, id.GID, nil
		}
	}
	return uint32(n), uint32(n), nil
}

func (r *recorded) groupID(name string) (uint32, error) {
	if gid, known := r.Groups[name]; known {
		return gid, nil
	}
	n, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("group %q is not in the recording, which has %v alone: give a number",
			symptom.Printable(name, 64), named(r.Groups))
	}
	return uint32(n), nil
}
