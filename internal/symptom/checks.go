package symptom

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// cannotReach is the prefix that users' runbooks know.
const cannotReach = "Cannot reach the Traffic Director API server"

// cloudPlatform is the scope that the control plane's API asks for.
const cloudPlatform = "https://www.googleapis.com/auth/cloud-platform"

func foreignOwner(f Facts) (out []Finding) {
	if f.UserErr != nil {
		return nil
	}
	const orElse = "and stop it, or set --proxy-user if Envoy runs as that user"
	for _, p := range f.Ports {
		if !p.Listening || p.Owner == f.ProxyUID || p.Purpose == "admin" && p.Owner == 0 ||
			slices.Contains(f.Processes, p.Owner) { // the last is otherUser's
			continue
		}
		if !p.Addr.IsValid() {
			socket := f.Envoy.adminSocket()
			out = append(out, finding(ForeignOwner, 32, Error, "find it with `ss -lxp` "+orElse,
				"Envoy's %s socket %s is held by %s, not by the proxy's user %s (uid %d): nothing from "+
					"there is believed", p.Purpose, f.Envoy.Admin, p.owner(), name(f.ProxyUser), f.ProxyUID).
				under(p.Purpose).
				seen(FromSockets, time.Time{}, fmt.Sprintf("%s %s", name(socket), p.owner())).
				try("sudo ss -lxp", "ls -l -- "+word(socket, "SOCKET")))
			continue
		}
		then := orElse
		if p.Owner == 0 { // who Envoy must not run as; Docker's proxy of a published port does
			then = "and stop it; a port of Envoy's must not be published by a container (`-p`), which " +
				"needs the VM's network instead"
		}
		out = append(out, finding(ForeignOwner, 32, Error,
			fmt.Sprintf("find it with `ss -ltunp sport = :%d` ", p.Addr.Port())+then,
			"Port %d (%s) is held by %s, not by the proxy's user %s (uid %d): interception is off and "+
				"nothing from there is believed",
			p.Addr.Port(), p.Purpose, p.owner(), name(f.ProxyUser), f.ProxyUID).
			under(p.Addr.String()).seen(FromSockets, time.Time{}, p.socket()).
			try(listens(p.Addr.Port()), fmt.Sprintf("ps -fu %d", p.Owner)))
	}
	return out
}

// resolverLoop: a resolver of the VM whose own questions go to Envoy, which asks the VM's resolver.
// Whether it asks anybody (an authoritative server does not), and whether Envoy asks it, is not
// known. Of a socket of root's nobody can tell who asks by it: dnsmasq and unbound make theirs
// before they become another user.
func resolverLoop(f Facts) (out []Finding) {
	if f.UserErr != nil {
		return nil
	}
	reported := map[uint32]bool{f.ProxyUID: true}
	for _, p := range f.Resolvers {
		if reported[p.Owner] || slices.Contains(f.ResolverUIDs, p.Owner) ||
			p.Owner == 0 && len(f.ResolverUIDs) > 0 {
			continue
		}
		reported[p.Owner] = true
		who := cmp.Or(name(p.OwnerName), strconv.FormatUint(uint64(p.Owner), 10))
		if p.Owner == 0 {
			who = "the user it runs as"
		}
		out = append(out, finding(ResolverLoop, 42, Warning,
			"if so, name "+who+" in --resolver-users, together with those that are there now",
			"Questions of the resolver on %v of %s go to Envoy's DNS listener, too (intercept-dns); "+
				"if it asks other resolvers, and Envoy asks it, they go in a circle", p.Addr, p.owner()).
			under(strconv.FormatUint(uint64(p.Owner), 10)).
			seen(FromSockets, time.Time{}, p.socket()).
			try(listens(p.Addr.Port()), editDefaults, restartAgent))
	}
	return out
}

// owner is for people; the check itself goes by the number.
func (p Port) owner() string {
	if p.OwnerName == "" {
		return fmt.Sprintf("uid %d", p.Owner)
	}
	return fmt.Sprintf("%s (uid %d)", name(p.OwnerName), p.Owner)
}

// socket is what the kernel says of it.
func (p Port) socket() string {
	if !p.Listening {
		return fmt.Sprintf("nothing listens on %v", p.Addr)
	}
	if !p.Addr.IsValid() { // a Unix socket
		return fmt.Sprintf("LISTEN %s socket %s", p.Purpose, p.owner())
	}
	return fmt.Sprintf("LISTEN %v %s", p.Addr, p.owner())
}

func proxyUser(f Facts) []Finding {
	// Where nobody answered, that is no trouble of the user's.
	if f.UserErr == nil || f.UserErr.Error() == f.Unseen[FromUsers] {
		return nil
	}
	user := word(f.ProxyUser, "USER")
	found := finding(ProxyUser, 15, Error,
		"create the user Envoy runs as, or name it with --proxy-user",
		"No rules without the proxy's user, or its own traffic would loop: %v", f.UserErr).
		seen(FromUsers, time.Time{}, f.UserErr.Error()).
		try("getent passwd " + user)
	if _, err := strconv.ParseUint(f.ProxyUser, 10, 32); err != nil && f.ProxyUser != "root" {
		found = found.try("sudo useradd --system --no-create-home --shell /usr/sbin/nologin " + user)
	}
	return []Finding{found.try(editDefaults, restartAgent)}
}

func envoyDown(f Facts) []Finding {
	if !errors.Is(f.Envoy.Err, envoyadmin.ErrRefused) || f.Envoy.Handover {
		return nil
	}
	if f.serves() {
		why := safe(": the next Envoy did not take over from it")
		next := "it is tried again by itself; see `systemctl status service-proxy-envoy` for why, and " +
			"restart Envoy, which drains it, if this lasts"
		commands := []string{statusEnvoy, f.tailLog(), restartEnvoy}
		if f.Envoy.adminSocket() != "" { // our own unit's Envoy has a port
			why, next = "", "a container must share the folder of that socket; see "+f.envoyLog()+
				" for where Envoy has its own"
			commands = []string{f.listSocket(), statusEnvoy, f.tailLog()}
		}
		found := finding(AdminUnreadable, 0, Error, next,
			"Envoy serves, but nothing accepts on its admin address %s%s; the rules stay as they are",
			f.Envoy.Admin, why).
			seen(FromEnvoy, f.Envoy.Since, f.Envoy.Err.Error()).
			seen(FromUnit, time.Time{}, f.Envoy.Unit).
			try(commands...)
		found.Since = f.Envoy.Since
		return []Finding{found}
	}
	next, commands := "see `systemctl status service-proxy-envoy` and "+f.envoyLog(),
		[]string{statusEnvoy, f.tailLog(), restartEnvoy}
	if f.Envoy.Unit == NoUnit {
		next, commands = "see how it is run, and "+f.envoyLog(), []string{showEnvoys, f.tailLog()}
	}
	switch {
	case f.Envoy.adminSocket() != "":
		next += "; a container must share the folder of that socket"
		commands = append(commands, f.listSocket())
	case f.Envoy.Unit == NoUnit:
		next += "; a container needs the VM's network (--network host)"
	}
	cause := say("Envoy is not running: nothing accepts on its admin address %s", f.Envoy.Admin)
	if !f.Envoy.Since.IsZero() {
		cause += " since " + f.Envoy.Since.UTC().Format(time.RFC3339)
	}
	if f.Envoy.Unit != "" && f.Envoy.Unit != NoUnit {
		cause += say(" (unit %s)", name(f.Envoy.Unit))
	}
	if f.Envoy.LastError != "" {
		cause += say(", last error in its log: %s", f.Envoy.LastError)
	}
	found := finding(EnvoyDown, 1, Error, next, "%s", safe(cause)).
		seen(FromEnvoy, f.Envoy.Since, f.Envoy.Err.Error()).
		seen(FromUnit, time.Time{}, f.Envoy.Unit).
		seen(FromEnvoyLog, time.Time{}, f.Envoy.LastError).
		try(commands...)
	found.Since = f.Envoy.Since
	return []Finding{found}
}

// serves says whether the proxy's user accepts on an interception port, in a unit that runs: an
// Envoy whose child has had it close its admin interface, and then failed.
func (f Facts) serves() bool {
	return strings.HasPrefix(f.Envoy.Unit, "active") && f.UserErr == nil &&
		slices.ContainsFunc(f.Ports, func(p Port) bool {
			return p.Listening && p.Owner == f.ProxyUID && strings.HasSuffix(p.Purpose, "interception")
		})
}

func adminUnreadable(f Facts) []Finding {
	err := f.Envoy.Err
	var foreign *sockdiag.ForeignError
	if err == nil || errors.Is(err, envoyadmin.ErrRefused) || errors.As(err, &foreign) {
		return nil // the last is row 32's
	}
	if f.Envoy.Handover {
		return nil
	}
	next := "the rules stay as they are; see " + f.envoyLog() + ", and restart Envoy if this lasts"
	commands := []string{f.ask("/server_info"), statusEnvoy, f.tailLog()}
	switch {
	case f.Envoy.adminSocket() != "" && errors.Is(err, fs.ErrPermission):
		next = "the rules stay as they are; give the agent's user Envoy's group, that group the folder " +
			"of the socket, and admin.address.pipe in Envoy's bootstrap the mode 0660 (mode: 432)"
		commands = []string{f.listSocket(), "id service-proxy-agent"}
	case errors.Is(err, envoyadmin.ErrForbiddenPath):
		next = "add prefixes /config_dump, /server_info, /ready, /stats and /clusters to " +
			"admin.allow_paths in Envoy's bootstrap"
	case errors.Is(err, envoyadmin.ErrTimeout):
		next = "Envoy's main thread may be busy or stopped; the rules stay as they are; see `systemctl " +
			"status service-proxy-envoy`"
	case errors.Is(err, envoyadmin.ErrTooLarge):
		next = "the rules stay as they are; fewer services per network or scope make the configuration " +
			"smaller"
	}
	found := finding(AdminUnreadable, 0, Error, next,
		"Envoy's admin interface on %s gives no usable answer: %v", f.Envoy.Admin, err).
		seen(FromEnvoy, f.Envoy.Since, err.Error()).
		try(commands...)
	found.Since = f.Envoy.Since
	return []Finding{found}
}

var (
	notUsedRE = regexp.MustCompile(`has not been used in project (\S+) before or it is disabled`)
	networkRE = regexp.MustCompile(
		`configuration was not found for network "([^"]*)" in project "([^"]*)"`)
)

func controlPlane(f Facts) []Finding {
	if err := f.Envoy.Probe; err != nil {
		return []Finding{f.unreachable(err)}
	}
	// What tells no cause waits for what is about to (Trying). Said at once, one outage would be told
	// twice, and agent-last-failure has one line a minute.
	s := f.Envoy.Stream
	if s == nil {
		if f.Envoy.Apart && !f.Envoy.Trying {
			return []Finding{finding(ControlPlaneConnect, 4, Error,
				"see the warnings in "+f.envoyLog(),
				"%s: Envoy has no stream to it and its log gives no reason%s",
				safe(cannotReach), f.Envoy.though()).
				seen(FromEnvoy, time.Time{}, "control_plane.connected_state: 0").try(f.tailLog())}
		}
		return nil
	}
	if f.Envoy.Trying && s.ofConnection() {
		return nil
	}
	return []Finding{f.refused(s).seen(FromEnvoyLog, s.When, s.line())}
}

// unreachable is of our own way to the control plane. The code and text of the stream say nothing
// here: Envoy gives "closed: 13, " or no line at all for all of it.
func (f Facts) unreachable(err error) Finding {
	host := "trafficdirector.googleapis.com"
	var probe *envoyadmin.ProbeError
	if errors.As(err, &probe) && probe.Target != "" {
		host = hostOf(probe.Target)
	}
	host = word(host, "HOST")
	if errors.Is(err, envoyadmin.ErrLookUp) {
		return finding(ControlPlaneLookUp, 3, Error,
			"check the VM's resolver (/etc/resolv.conf) and the network's DNS", "%s: %v", safe(cannotReach),
			err).seen(FromControlPlane, time.Time{}, err.Error()).
			try("getent ahosts "+host, "cat /etc/resolv.conf",
				"gcloud dns managed-zones list --project="+f.project())
	}
	return finding(ControlPlaneConnect, 4, Error,
		"a firewall may block TCP 443; Private Google Access or Cloud NAT is needed without an "+
			"external address", "%s: %v", safe(cannotReach), err).
		seen(FromControlPlane, time.Time{}, err.Error()).
		try("curl -sSv -m 10 -o /dev/null https://"+host+"/",
			"gcloud compute firewall-rules list --project="+f.project()+" --filter=direction=EGRESS",
			f.instance("describe", "--format='yaml(networkInterfaces)'"))
}

// refused is of a stream that the control plane ended. Its words come under the old name of the
// product, Traffic Director, and the new one, Cloud Service Mesh.
func (f Facts) refused(s *Stream) Finding {
	switch {
	case s.Code == 7:
		return f.denied(s)
	case s.Code == 5:
		next, row := "check the mesh, scope or network name in the gce-service-proxy attribute", 9
		if strings.Contains(s.Message, "configuration was not found") {
			row = 8
		}
		if m := networkRE.FindStringSubmatch(s.Message); m != nil {
			next = fmt.Sprintf(
				"create a forwarding rule (INTERNAL_SELF_MANAGED) or a mesh for network %q in project %q, or "+
					"correct the attribute", short(m[1]), short(m[2]))
		}
		of := f.meshProject()
		return finding(ConfigNotFound, row, Error, next, "%s: %s", safe(cannotReach), s.words()).
			seen(FromEnvoy, time.Time{}, f.Envoy.node()).
			try("gcloud compute forwarding-rules list --global --project="+of+
				" --filter=loadBalancingScheme=INTERNAL_SELF_MANAGED",
				"gcloud network-services meshes list --location=global --project="+of,
				askMetadata("", readAttribute))
	case s.Message == "":
		return finding(ControlPlaneConnect, 4, Error,
			"a firewall may block TCP 443; see the warnings in "+f.envoyLog(),
			"%s: Envoy's stream%s ended with gRPC code %d and no reason%s",
			safe(cannotReach), safe(target(s)), s.Code, f.Envoy.though()).try(f.tailLog(),
			"gcloud compute firewall-rules list --project="+f.project()+" --filter=direction=EGRESS")
	}
	return finding(ControlPlaneRefused, 0, Error, "see "+f.envoyLog(), "%s: %s",
		safe(cannotReach), s.words()).try(f.grepStream())
}

// denied is gRPC's code 7.
func (f Facts) denied(s *Stream) Finding {
	if m := notUsedRE.FindStringSubmatch(s.Message); m != nil {
		enable := "gcloud services enable trafficdirector.googleapis.com --project=" +
			word(m[1], "PROJECT")
		return finding(APINotEnabled, 5, Error, "enable it: "+enable,
			"%s: the API is not enabled in project %s", safe(cannotReach), name(m[1])).try(enable)
	}
	// Without the scope no role helps. Envoy's own words for it are not known, the
	// metadata server's are.
	if f.Scopes != nil && !slices.Contains(f.Scopes, cloudPlatform) {
		return finding(ScopeMissing, 7, Error,
			"stop the VM, then gcloud compute instances set-service-account NAME --scopes="+cloudPlatform,
			"%s: the VM's service account %s lacks the scope cloud-platform", safe(cannotReach),
			name(f.Account)).
			seen(FromMetadata, time.Time{}, "scopes: "+strings.Join(f.Scopes, " ")).
			try(f.instance("stop"), f.instance("set-service-account", "--scopes="+cloudPlatform),
				f.instance("start"))
	}
	return finding(PermissionDenied, 6, Error,
		"grant roles/trafficdirector.client to "+cmp.Or(name(f.Account), "the VM's service account"),
		"%s: %s", safe(cannotReach), s.words()).
		try("gcloud projects add-iam-policy-binding " + f.meshProject() + " --member=" +
			word("serviceAccount:"+cmp.Or(f.Account, "ACCOUNT"), "serviceAccount:ACCOUNT") +
			" --role=roles/trafficdirector.client")
}

// though tells of our own way to the control plane where Envoy's is broken and ours is not known to
// be: whether it works only a try tells, which comes a moment later.
func (e Envoy) though() safe {
	if !e.Probed || e.Probe != nil {
		return ""
	}
	return ", though our own connection works"
}

func target(s *Stream) string {
	if s.Target == "" {
		return ""
	}
	return " to " + name(s.Target)
}

// ofConnection says whether it ended by words of Envoy's own (its local replies), or by none.
func (s *Stream) ofConnection() bool {
	return s.Code != 5 && s.Code != 7 && (s.Message == "" ||
		strings.HasPrefix(s.Message, "upstream connect error") ||
		strings.HasPrefix(s.Message, "upstream_reset_"))
}

// words are the control plane's, and their code.
func (s *Stream) words() safe {
	if s.Message == "" {
		return safe(fmt.Sprintf("gRPC code %d", s.Code))
	}
	return safe(say("%s (gRPC code %d)", strings.TrimSuffix(s.Message, "."), s.Code))
}

// node is whom Envoy presents itself as, "" when not known.
func (e Envoy) node() string {
	if e.Node == "" {
		return ""
	}
	return "node.id " + e.Node
}

// line is what Envoy logged.
func (s *Stream) line() string {
	return fmt.Sprintf("gRPC config stream%s closed: %d, %s", target(s), s.Code, s.Message)
}

func notConfigured(f Facts) []Finding {
	if f.Envoy.Err != nil || f.Envoy.State == "" || f.Envoy.State == "DRAINING" ||
		f.Envoy.Configured || f.Envoy.Handover {
		return nil
	}
	return []Finding{finding(EnvoyNotConfigured, 2, Error,
		"the rules stay as they are until it has; look for `gRPC config stream` in "+
			f.envoyLog(),
		"Envoy has not received its configuration (state %s)", name(f.Envoy.State)).
		seen(FromEnvoy, time.Time{}, f.Envoy.State).try(f.grepStream(), f.ask("/ready"))}
}

func tooOld(f Facts) []Finding {
	v := f.Envoy.Version
	next := fmt.Sprintf("install Envoy %v or newer", envoyadmin.Advised)
	var found Finding
	switch {
	case v == (envoyadmin.Version{}):
		return nil
	case v.Less(envoyadmin.Minimum):
		found = finding(EnvoyTooOld, 25, Error, next, "Envoy %v is too old: %v is the minimum", v,
			envoyadmin.Minimum)
	case v.Less(envoyadmin.Advised):
		found = finding(EnvoyTooOld, 25, Advice, next, "Envoy %v is old", v)
	default:
		return nil
	}
	return []Finding{found.seen(FromEnvoy, time.Time{}, "version "+v.String()).
		try(layout.Envoy+" --version", "sudo systemctl restart service-proxy-bootstrap")}
}

func families(f Facts) (out []Finding) {
	for _, fam := range f.Families {
		for _, found := range fam.findings() {
			out = append(out, found.under(fam.Family.String()))
		}
	}
	return out
}

func (fam Family) findings() (out []Finding) {
	save := "sudo " + tables(fam.Family) + "-save -t nat"
	module := tableModule(fam)
	switch err := fam.Err; {
	case errors.Is(fam.Unusable, iptables.ErrNoModules):
		severity, rest := Error, ""
		if fam.Family == iptables.IPv6 {
			severity, rest = Warning, "IPv4 goes on; "
		}
		out = append(out, finding(FamilyUnusable, 16, severity,
			rest+"only a reboot brings it back: `modprobe` cannot",
			"%v interception is off: %v", fam.Family, fam.Unusable).
			seen(FromKernel, time.Time{}, fam.Unusable.Error()).
			try(rebootForModules...))
	case errors.Is(fam.Unusable, iptables.ErrNoIPTables) && fam.Family == iptables.IPv6:
		out = append(out, finding(FamilyUnusable, 16, Warning,
			"IPv4 goes on; install the package that has ip6tables ("+howToInstall+")",
			"IPv6 interception is off: %v", fam.Unusable).
			seen(FromKernel, time.Time{}, fam.Unusable.Error()).try(installIPTables))
	case fam.Unusable != nil && fam.Family == iptables.IPv6:
		out = append(out, finding(FamilyUnusable, 16, Warning,
			"IPv4 goes on; `modprobe "+module+"` or a reboot brings it back",
			"IPv6 interception is off: %v", fam.Unusable).
			seen(FromKernel, time.Time{}, fam.Unusable.Error()).try("sudo modprobe "+module))
	case fam.Unusable != nil:
		out = append(out, finding(FamilyUnusable, 16, Error,
			"`modprobe "+module+"` or a reboot brings it back",
			"%v interception is off: %v", fam.Family, fam.Unusable).
			seen(FromKernel, time.Time{}, fam.Unusable.Error()).try("sudo modprobe "+module))
	case errors.Is(err, iptables.ErrCouldNotLook):
		out = append(out, finding(CouldNotLook, 17, Error,
			"it is tried again; look for a program that changes rules all the time",
			"The %v rules could not be read: %v", fam.Family, err).
			seen(FromKernel, time.Time{}, err.Error()).
			try("time "+save+" > /dev/null", "sudo timeout 10 nft monitor"))
	case err != nil:
		next, commands := nextForRules(fam.Family, err)
		out = append(out, finding(RuleRefused, 17, Error, next,
			"The %v rules could not be applied: %v", fam.Family, err).
			seen(FromKernel, time.Time{}, err.Error()).try(commands...))
	}
	for i, left := range fam.Left {
		if i > 0 && left.Rule == fam.Left[i-1].Rule {
			continue // the comments of many rules
		}
		severity := Error
		if left.Rule == iptables.CommentMatch {
			severity = Warning // nothing is missing but words
		}
		if left.NoModules != "" {
			out = append(out, finding(RuleRefused, 17, severity,
				"only a reboot loads the match or target it names; everything else is in place",
				"The kernel refuses the %v rule %q: %s; %s", fam.Family, name(left.Rule), left.Stderr,
				left.NoModules).
				seen(FromKernel, time.Time{}, left.Stderr).
				try(rebootForModules...))
			continue
		}
		out = append(out, finding(RuleRefused, 17, severity,
			"`modprobe` the match or target it names; everything else is in place, and it is tried again",
			"The kernel refuses the %v rule %q: %s", fam.Family, name(left.Rule), left.Stderr).
			seen(FromKernel, time.Time{}, left.Stderr).try(loadExtension(left.Stderr)...))
	}
	for _, s := range fam.Shadow {
		out = append(out, finding(Shadowed, 18, Error,
			"take that rule out, or give it matches that leave intercepted traffic alone",
			"Our jump in %s is never reached for some traffic: %s stands before it (%v)", s.Chain,
			s.Rule, fam.Family).
			seen(FromKernel, time.Time{}, s.String()).
			try(fmt.Sprintf("sudo %s -t nat -L %s -n -v --line-numbers", tables(fam.Family),
				word(s.Chain, "CHAIN"))))
	}
	return append(out, fam.changed()...)
}

// changed is what somebody did to rules of ours.
func (fam Family) changed() []Finding {
	by := safe("")
	if fam.By != "" {
		by = safe(" by " + name(fam.By))
	}
	first := ""
	if len(fam.Drift) > 0 {
		first = fam.Drift[0].String()
	}
	switch {
	case fam.Fighting:
		return []Finding{finding(Fight, 18, Error,
			"stop that program or make it leave SERVICE_PROXY_* rules alone; they are put back every few "+
				"seconds until then",
			"The %v interception rules are undone again and again%s (%d times)", fam.Family, by,
			fam.Undone).
			seen(FromKernel, time.Time{}, first).seen(FromKernel, time.Time{}, fam.By).
			try(showProcess(fam.By)...).try("sudo timeout 10 nft monitor")}
	case first != "":
		d := fam.Drift[0]
		where := d.Chain
		if d.Rule != "" {
			where += ": " + d.Rule
		}
		return []Finding{finding(DriftRepaired, 13, Warning,
			"repaired; nothing to do unless it comes back",
			"%v rules were changed%s: %v (%s)", fam.Family, by, d.Kind, where).
			seen(FromKernel, time.Time{}, first).seen(FromKernel, time.Time{}, fam.By).
			try(showProcess(fam.By)...).try("sudo journalctl SERVICE_PROXY_ID=" + string(DriftRepaired))}
	}
	return nil
}

func nextForRules(family iptables.Family, err error) (next string, commands []string) {
	switch {
	case errors.Is(err, iptables.ErrLocked):
		return "it is tried again; `lsof /run/xtables.lock` names the program",
			[]string{"sudo lsof /run/xtables.lock"}
	case errors.Is(err, iptables.ErrIncompatible):
		nft := map[iptables.Family]string{iptables.IPv4: "ip", iptables.IPv6: "ip6"}[family]
		return "a program made this table in a form iptables cannot read: `nft list table " + nft +
				" nat` shows it; remove those rules or use one backend",
			[]string{"sudo nft list table " + nft + " nat"}
	case errors.Is(err, iptables.ErrNotRoot):
		return "run as root or with CAP_NET_ADMIN and CAP_NET_RAW",
			[]string{"systemctl show -p User,AmbientCapabilities service-proxy-agent"}
	}
	if errors.Is(err, iptables.ErrNoModules) {
		return "only a reboot loads the match or table it names", rebootForModules
	}
	return "it is tried again; `modprobe` the match or table it names", loadExtension(err.Error())
}

var unwritableRE = regexp.MustCompile(`unable to open file '([^']*)': (.*)`)

// maxAlike is how many findings of a kind are told one by one, of those that a control plane brings
// about as many of as it sends entries. 100,000 of them would be a Status of 60 MB, each second.
const maxAlike = 32

// firstAlike are the first of all, and how many more there are.
func firstAlike[T any](all []T) (some []T, more int) {
	n := min(len(all), maxAlike)
	return all[:n], len(all) - n
}

// moreAlike is the finding that stands for those that are not told one by one, like the last that
// is.
func moreAlike(out []Finding, n int, cause string) []Finding {
	if n == 0 {
		return out
	}
	last := out[len(out)-1]
	return append(out, finding(last.ID, last.Row, last.Severity, last.Next, cause, n).
		under("more").try(last.Commands...))
}

func rejected(f Facts) (out []Finding) {
	some, others := firstAlike(f.Envoy.Rejected)
	for _, r := range some {
		m := unwritableRE.FindStringSubmatch(r.Details)
		if m == nil {
			out = append(out, finding(ListenerRejected, 10, Error,
				"correct the configuration at the control plane",
				"Envoy rejected listener %s: %s; services new in it are not intercepted", name(r.Name),
				r.Details).
				under(r.Name).seen(FromEnvoy, time.Time{}, r.Details).
				try(f.ask("/config_dump?resource=dynamic_listeners&mask=name,error_state.details"),
					f.grepLog("", "'config rejected'")))
			continue
		}
		file := word(m[1], "FILE")
		out = append(out, finding(AccessLogUnwritable, 11, Error,
			say("make %s writable by %s (`ls -ld` tells who owns it now), or choose another access-log path",
				name(m[1]), name(f.ProxyUser)),
			"Envoy rejected listener %s: it cannot write the access log %s (%s); services new in it are "+
				"not intercepted", name(r.Name), name(m[1]), m[2]).
			under(r.Name).seen(FromEnvoy, time.Time{}, r.Details).
			try("sudo ls -ld -- "+file, "sudo ls -ld -- \"$(dirname -- "+file+")\"",
				"id "+word(f.ProxyUser, "USER")))
	}
	return moreAlike(out, others, "Envoy rejected %d more listeners")
}

func attributeBad(f Facts) []Finding {
	if f.Attribute == nil {
		return nil
	}
	next := "correct it"
	if errors.Is(f.Attribute, attribute.ErrMissing) {
		next = "or give this VM one (" + DocsURL + "attribute.md)"
	}
	return []Finding{finding(AttributeBad, 26, Error, next+"; until then "+inForce(f),
		"The gce-service-proxy attribute cannot be used: %v", f.Attribute).
		seen(FromMetadata, time.Time{}, f.Attribute.Error()).try(f.setAttribute()...)}
}

// inForce says what holds while the attribute cannot be read.
func inForce(f Facts) string {
	if f.NoAttribute {
		return "the rules stay as they are"
	}
	return "the last good one stays in force"
}

func bootstrapFailed(f Facts) []Finding {
	if f.Bootstrap == "" {
		return nil
	}
	return []Finding{finding(Bootstrap, 26, Error, "", "Bootstrap failed: %s",
		safe(Printable(f.Bootstrap, maxCause))).
		seen(FromState, time.Time{}, f.Bootstrap).
		try("sudo journalctl -u service-proxy-bootstrap -n 50",
			"sudo systemctl restart service-proxy-bootstrap")}
}

func metadataServer(f Facts) []Finding {
	if f.Metadata == nil {
		return nil
	}
	return []Finding{finding(MetadataServer, 0, Error, "it is asked again, and until then "+inForce(f)+
		"; check that nothing on the VM blocks 169.254.169.254 or stands before it",
		"The metadata server gives no usable answer about the attribute: %v", f.Metadata).
		seen(FromMetadata, time.Time{}, f.Metadata.Error()).
		try(askMetadata("-v -m 5 ", readAttribute), "ip route get 169.254.169.254",
			"sudo iptables-save | grep 169.254")}
}

func portClosed(f Facts) (out []Finding) {
	for _, p := range f.Ports {
		if p.Listening || p.Purpose == "admin" {
			continue
		}
		why := errNobody
		if p.Err != nil {
			why = p.Err
		}
		next := "see " + f.envoyLog() + " for a bind error"
		commands := []string{listens(p.Addr.Port()), f.grepLog("-i ", "bind")}
		switch {
		case errors.Is(f.Envoy.Err, envoyadmin.ErrRefused): // there is no Envoy that could
			next, commands = "it accepts by itself once Envoy runs", nil
		case f.Envoy.adminSocket() != "" && f.Envoy.Err == nil: // which leads into any network
			next = "if Envoy runs in a container, give that the VM's network (--network host); else " + next
		}
		severity := Error
		if f.Brake.Off { // nothing is redirected to it, and nothing shall be
			severity = Warning
		}
		out = append(out, finding(InterceptionNotReady, 0, severity, next,
			"Envoy's %s port %d does not accept %v connections (%v)", p.Purpose, p.Addr.Port(), p.Family,
			why).
			under(p.Addr.String()).seen(FromSockets, time.Time{}, p.socket()).try(commands...))
	}
	return out
}

var errNobody = errors.New("nothing accepts there")

func servingPorts(f Facts) (out []Finding) {
	for _, p := range f.Uncovered {
		n := strconv.Itoa(int(p))
		out = append(out, finding(ServingPortNoChain, 19, Warning,
			"check that the control plane knows this VM's serving port (backend service, endpoint policy)",
			"Envoy has no inbound listener for port %d yet; its traffic goes to the application directly",
			p).
			under(n).seen(FromEnvoy, time.Time{}, "no inbound filter chain for port "+n).
			try("gcloud network-services endpoint-policies list --location=global --project="+
				f.meshProject(),
				f.ask("/config_dump?resource=dynamic_listeners&name_regex=.*INBOUND.*")))
	}
	return out
}

func entries(f Facts) (out []Finding) {
	some, others := firstAlike(f.Refused)
	for _, r := range some {
		out = append(out, finding(EntryRefused, 0, Warning,
			"give the service another address at the control plane",
			"Listener %s asks for %s, which is never intercepted: %s", name(r.Listener), name(r.Entry),
			r.Reason).
			under(r.Listener+" "+r.Entry).
			seen(FromEnvoy, time.Time{}, name(r.Listener)+": "+r.Entry).
			try(f.ask("/config_dump?resource=dynamic_listeners")))
	}
	return moreAlike(out, others, "Listeners ask for %d more entries that are never intercepted")
}

func skipped(f Facts) (out []Finding) {
	some, others := firstAlike(f.Envoy.Skipped)
	for _, s := range some {
		out = append(out, finding(ListenerSkipped, 0, Warning, "",
			"Listener %s is not intercepted: %s", name(s.Listener), s.Reason).
			under(s.Listener).seen(FromEnvoy, time.Time{}, name(s.Listener)+": "+s.Reason).
			try(f.ask("/listeners?format=json")))
	}
	return moreAlike(out, others, "%d more listeners are not intercepted")
}

func serverFirst(f Facts) (out []Finding) {
	for _, p := range f.ServerFirst {
		n := strconv.Itoa(int(p))
		out = append(out, finding(ServerFirst, 22, Advice, "set exclude-outbound-port-ranges="+n,
			"Port %d usually speaks a protocol in which the server talks first, which hangs behind an HTTP "+
				"or TLS inspecting listener", p).
			under(n).
			seen(FromEnvoy, time.Time{}, "an inspecting filter chain for port "+n).
			try(f.setAttribute()...))
	}
	return out
}

func others(f Facts) (out []Finding) {
	for _, o := range f.Others {
		look := strings.Join([]string{"sudo nft list chain", word(o.Family, "FAMILY"),
			word(o.Table, "TABLE"), word(o.Chain, "CHAIN")}, " ")
		if o.Backend == "legacy" {
			look = "sudo iptables-legacy -t nat -S"
			if o.Family == "ip6" {
				look = "sudo ip6tables-legacy -t nat -S"
			}
		}
		out = append(out, finding(OtherChain, 34, Advice,
			"check with `nft list ruleset` that it leaves the services' addresses alone",
			"Another nat chain may come before ours: %v", o).
			under(fmt.Sprint(o)).seen(FromOthers, time.Time{}, o.String()).try(look))
	}
	return out
}

func guestOff(f Facts) []Finding {
	if !f.GuestOff {
		return nil
	}
	return []Finding{finding(GuestAttributesOff, 27, Warning,
		"set the metadata enable-guest-attributes=TRUE on the VM",
		"Guest attributes are disabled: nobody outside can read this agent's status").
		seen(FromMetadata, time.Time{}, "403 for a guest attribute").
		try(f.instance("add-metadata", "--metadata=enable-guest-attributes=TRUE"))}
}

func listenAddress(f Facts) (out []Finding) {
	if f.ListenErr != nil {
		what := "/healthz and /metrics are"
		if f.MetricsApart {
			what = "/healthz is"
		}
		out = append(out, finding(ListenAddress, 0, Warning,
			"stop the program that holds it or set --listen; interception goes on",
			"%s not served: %v", what, f.ListenErr).
			seen(FromAgent, time.Time{}, f.ListenErr.Error()).try(showListener(f.ListenErr)...))
	}
	if f.MetricsErr != nil {
		out = append(out, finding(ListenAddress, 0, Warning,
			"it is tried again every few seconds; interception goes on",
			"/metrics is not served as it should be: %v", f.MetricsErr).
			under("metrics").seen(FromAgent, time.Time{}, f.MetricsErr.Error()).
			try(showListener(f.MetricsErr)...))
	}
	return out
}

func logUnreadable(f Facts) []Finding {
	if f.Envoy.LogErr == "" {
		return nil
	}
	return []Finding{finding(LogUnreadable, 0, Warning,
		"have Envoy write it there, readable for the agent's user (from a container, in a folder that "+
			"it shares), or name another by --envoy-log; until then changes are seen up to a second later "+
			"and the control plane's words are not known",
		"Envoy's log cannot be read: %s", f.Envoy.LogErr).
		seen(FromEnvoyLog, time.Time{}, f.Envoy.LogErr).try("sudo ls -ld " +
		f.logFolder() + " " + f.logFile())}
}

func attributeAdvice(f Facts) (out []Finding) {
	for _, text := range f.Advice {
		out = append(out, finding(AttributeAdvice, 0, Warning, "see "+DocsURL+"attribute.md",
			"The gce-service-proxy attribute: %s", text).
			under(text).seen(FromMetadata, time.Time{}, text).try(f.setAttribute()...))
	}
	return out
}
