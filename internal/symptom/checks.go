package symptom

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// cannotReach is the prefix that users' runbooks know.
const cannotReach = "Cannot reach the Traffic Director API server"

// cloudPlatform is the scope that the control plane's API asks for.
const cloudPlatform = "https://www.googleapis.com/auth/cloud-platform"

func one(id ID, row int, s Severity, next, cause string, args ...any) []Finding {
	return []Finding{{ID: id, Row: row, Severity: s, Cause: fmt.Sprintf(cause, args...), Next: next}}
}

func foreignOwner(f Facts) (out []Finding) {
	if f.UserErr != nil {
		return nil
	}
	for _, p := range f.Ports {
		if !p.Listening || p.Owner == f.ProxyUID || p.Purpose == "admin" && p.Owner == 0 {
			continue
		}
		if !p.Addr.IsValid() {
			out = append(out, Finding{ID: ForeignOwner, Row: 32, Severity: Error, Key: p.Purpose,
				Cause: fmt.Sprintf(
					"Envoy's %s socket %s is held by %s, not by the proxy's user %s (uid %d): nothing from "+
						"there is believed", p.Purpose, f.Envoy.Admin, p.owner(), f.ProxyUser, f.ProxyUID),
				Next: "find it with `ss -lxp` and stop it, or set --proxy-user if Envoy runs as that user"})
			continue
		}
		out = append(out, Finding{ID: ForeignOwner, Row: 32, Severity: Error, Key: p.Addr.String(),
			Cause: fmt.Sprintf(
				"Port %d (%s) is held by %s, not by the proxy's user %s (uid %d): interception is off and "+
					"nothing from there is believed",
				p.Addr.Port(), p.Purpose, p.owner(), f.ProxyUser, f.ProxyUID),
			Next: fmt.Sprintf(
				"find it with `ss -ltunp sport = :%d` and stop it, or set --proxy-user if Envoy runs as that "+
					"user", p.Addr.Port())})
	}
	return out
}

// resolverLoop: a resolver of the VM whose own questions go to Envoy, which asks the VM's resolver.
// Whether it asks anybody (an authoritative server does not), and whether Envoy asks it, is not
// known. Of a socket of root's nobody can tell who asks by it: dnsmasq and unbound make theirs
// before they become another user.
func resolverLoop(f Facts) (out []Finding) {
	reported := map[uint32]bool{f.ProxyUID: true}
	for _, p := range f.Resolvers {
		if reported[p.Owner] || slices.Contains(f.ResolverUIDs, p.Owner) ||
			p.Owner == 0 && len(f.ResolverUIDs) > 0 {
			continue
		}
		reported[p.Owner] = true
		name := cmp.Or(p.OwnerName, strconv.FormatUint(uint64(p.Owner), 10))
		if p.Owner == 0 {
			name = "the user it runs as"
		}
		out = append(out, Finding{ID: ResolverLoop, Row: 42, Severity: Warning,
			Key: strconv.FormatUint(uint64(p.Owner), 10),
			Cause: fmt.Sprintf(
				"Questions of the resolver on %v of %s go to Envoy's DNS listener, too (intercept-dns); "+
					"if it asks other resolvers, and Envoy asks it, they go in a circle", p.Addr, p.owner()),
			Next: fmt.Sprintf("then add %s to --resolver-users", name)})
	}
	return out
}

// owner is for people; the check itself goes by the number.
func (p Port) owner() string {
	if p.OwnerName == "" {
		return fmt.Sprintf("uid %d", p.Owner)
	}
	return fmt.Sprintf("%s (uid %d)", p.OwnerName, p.Owner)
}

func proxyUser(f Facts) []Finding {
	if f.UserErr == nil {
		return nil
	}
	return one(ProxyUser, 15, Error, "create the user Envoy runs as, or name it with --proxy-user",
		"No rules without the proxy's user, or its own traffic would loop: %v", f.UserErr)
}

func envoyDown(f Facts) []Finding {
	if !errors.Is(f.Envoy.Err, envoyadmin.ErrRefused) {
		return nil
	}
	cause := fmt.Sprintf("Envoy is not running: nothing accepts on its admin address %s",
		f.Envoy.Admin)
	if !f.Envoy.Since.IsZero() {
		cause += " since " + f.Envoy.Since.UTC().Format(time.RFC3339)
	}
	if f.Envoy.Unit != "" {
		cause += " (unit " + f.Envoy.Unit + ")"
	}
	if f.Envoy.LastError != "" {
		cause += ", last error in its log: " + f.Envoy.LastError
	}
	return one(EnvoyDown, 1, Error,
		"see `systemctl status service-proxy-envoy` and /var/log/envoy/envoy.err.log", "%s", cause)
}

func adminUnreadable(f Facts) []Finding {
	err := f.Envoy.Err
	var foreign *sockdiag.ForeignError
	if err == nil || errors.Is(err, envoyadmin.ErrRefused) || errors.As(err, &foreign) {
		return nil // the last is row 32's
	}
	next := "the rules stay as they are; see /var/log/envoy/envoy.err.log, and restart Envoy if " +
		"this lasts"
	switch {
	case errors.Is(err, envoyadmin.ErrForbiddenPath):
		next = "add prefixes /config_dump, /server_info, /ready and /stats to admin.allow_paths in " +
			"Envoy's bootstrap"
	case errors.Is(err, envoyadmin.ErrTimeout):
		next = "Envoy's main thread may be busy or stopped; the rules stay as they are; see `systemctl " +
			"status service-proxy-envoy`"
	case errors.Is(err, envoyadmin.ErrTooLarge):
		next = "the rules stay as they are; fewer services per network or scope make the configuration " +
			"smaller"
	}
	return one(AdminUnreadable, 0, Error, next,
		"Envoy's admin interface on %s gives no usable answer: %v", f.Envoy.Admin, err)
}

var (
	notUsedRE = regexp.MustCompile(`has not been used in project (\S+) before or it is disabled`)
	networkRE = regexp.MustCompile(
		`configuration was not found for network "([^"]*)" in project "([^"]*)"`)
)

func controlPlane(f Facts) []Finding {
	if err := f.Envoy.Probe; err != nil {
		// The code and text of the stream say nothing here: Envoy gives "closed: 13, " or no
		// line at all for both.
		if errors.Is(err, envoyadmin.ErrLookUp) {
			return one(ControlPlaneLookUp, 3, Error,
				"check the VM's resolver (/etc/resolv.conf) and the network's DNS", "%s: %v", cannotReach, err)
		}
		return one(ControlPlaneConnect, 4, Error,
			"a firewall may block TCP 443; Private Google Access or Cloud NAT is needed without an "+
				"external address", "%s: %v", cannotReach, err)
	}
	s := f.Envoy.Stream
	if s == nil {
		if f.Envoy.Apart {
			return one(ControlPlaneConnect, 4, Error, "see the warnings in /var/log/envoy/envoy.err.log",
				"%s: Envoy has no stream to it and its log gives no reason, though our own connection works",
				cannotReach)
		}
		return nil
	}
	switch {
	case s.Code == 7:
		if m := notUsedRE.FindStringSubmatch(s.Message); m != nil {
			return one(APINotEnabled, 5, Error,
				"enable it: gcloud services enable trafficdirector.googleapis.com --project="+m[1],
				"%s: the API is not enabled in project %s", cannotReach, m[1])
		}
		// Without the scope no role helps. Envoy's own words for it are not known, the
		// metadata server's are.
		if f.Scopes != nil && !slices.Contains(f.Scopes, cloudPlatform) {
			return one(ScopeMissing, 7, Error,
				"stop the VM, then gcloud compute instances set-service-account NAME --scopes="+cloudPlatform,
				"%s: the VM's service account %s lacks the scope cloud-platform", cannotReach, f.Account)
		}
		account := f.Account
		if account == "" {
			account = "the VM's service account"
		}
		return one(PermissionDenied, 6, Error, "grant roles/trafficdirector.client to "+account, "%s: %s",
			cannotReach, orCode(s))
	case s.Code == 5:
		next, row := "check the mesh, scope or network name in the gce-service-proxy attribute", 9
		if strings.Contains(s.Message, "configuration was not found") {
			row = 8
		}
		if m := networkRE.FindStringSubmatch(s.Message); m != nil {
			next = fmt.Sprintf(
				"create a forwarding rule (INTERNAL_SELF_MANAGED) or a mesh for network %q in project %q, or "+
					"correct the attribute", m[1], m[2])
		}
		return one(ConfigNotFound, row, Error, next, "%s: %s", cannotReach, orCode(s))
	case s.Message == "":
		return one(ControlPlaneConnect, 4, Error,
			"a firewall may block TCP 443; see the warnings in /var/log/envoy/envoy.err.log",
			"%s: Envoy's stream%s ended with gRPC code %d and no reason, though our own connection works",
			cannotReach, target(s), s.Code)
	}
	return one(ControlPlaneRefused, 0, Error, "see /var/log/envoy/envoy.err.log", "%s: %s",
		cannotReach, orCode(s))
}

func target(s *Stream) string {
	if s.Target == "" {
		return ""
	}
	return " to " + s.Target
}

func orCode(s *Stream) string {
	if s.Message == "" {
		return fmt.Sprintf("gRPC code %d", s.Code)
	}
	return strings.TrimSuffix(s.Message, ".") + fmt.Sprintf(" (gRPC code %d)", s.Code)
}

func notConfigured(f Facts) []Finding {
	if f.Envoy.Err != nil || f.Envoy.State == "" || f.Envoy.State == "DRAINING" || f.Envoy.Configured {
		return nil
	}
	return one(EnvoyNotConfigured, 2, Error,
		"the rules stay as they are until it has; look for `gRPC config stream` in "+
			"/var/log/envoy/envoy.err.log",
		"Envoy has not received its configuration (state %s)", f.Envoy.State)
}

func tooOld(f Facts) []Finding {
	v := f.Envoy.Version
	switch {
	case v == (envoyadmin.Version{}):
		return nil
	case v.Less(envoyadmin.Minimum):
		return one(EnvoyTooOld, 25, Error, fmt.Sprintf("install Envoy %v or newer", envoyadmin.Advised),
			"Envoy %v is too old: %v is the minimum", v, envoyadmin.Minimum)
	case v.Less(envoyadmin.Advised):
		return one(EnvoyTooOld, 25, Advice, fmt.Sprintf("install Envoy %v or newer", envoyadmin.Advised),
			"Envoy %v is old", v)
	}
	return nil
}

func families(f Facts) (out []Finding) {
	for _, fam := range f.Families {
		add := func(id ID, row int, s Severity, next, cause string, args ...any) {
			out = append(out, Finding{ID: id, Row: row, Severity: s, Cause: fmt.Sprintf(cause, args...),
				Next: next, Key: fam.Family.String()})
		}
		by := ""
		if fam.By != "" {
			by = " by " + fam.By
		}
		switch {
		case fam.Unusable != nil && fam.Family == iptables.IPv6:
			add(FamilyUnusable, 16, Warning,
				"IPv4 goes on; `modprobe ip6table_nat` or a reboot brings it back",
				"IPv6 interception is off: %v", fam.Unusable)
		case fam.Unusable != nil:
			add(FamilyUnusable, 16, Error, "`modprobe iptable_nat` or a reboot brings it back",
				"%v interception is off: %v", fam.Family, fam.Unusable)
		case errors.Is(fam.Err, iptables.ErrCouldNotLook):
			add(CouldNotLook, 17, Error,
				"it is tried again; look for a program that changes rules all the time",
				"The %v rules could not be read: %v", fam.Family, fam.Err)
		case fam.Err != nil:
			add(RuleRefused, 17, Error, nextForRules(fam.Family, fam.Err),
				"The %v rules could not be applied: %v", fam.Family, fam.Err)
		}
		for i, left := range fam.Left {
			if i > 0 && left.Rule == fam.Left[i-1].Rule {
				continue // the comments of many rules
			}
			severity := Error
			if left.Rule == iptables.CommentMatch {
				severity = Warning // nothing is missing but words
			}
			add(RuleRefused, 17, severity,
				"`modprobe` the match or target it names; everything else is in place, and it is tried again",
				"The kernel refuses the %v rule %q: %s", fam.Family, left.Rule, left.Stderr)
		}
		for _, s := range fam.Shadow {
			add(Shadowed, 18, Error,
				"take that rule out, or give it matches that leave intercepted traffic alone",
				"Our jump in %s is never reached for some traffic: %s stands before it (%v)", s.Chain,
				s.Rule, fam.Family)
		}
		if fam.Fighting {
			add(Fight, 18, Error,
				"stop that program or make it leave SERVICE_PROXY_* rules alone; they are put back every few "+
					"seconds until then",
				"The %v interception rules are undone again and again%s (%d times)", fam.Family, by, fam.Undone)
		} else if len(fam.Drift) > 0 {
			d := fam.Drift[0]
			where := d.Chain
			if d.Rule != "" {
				where += ": " + d.Rule
			}
			add(DriftRepaired, 13, Warning, "repaired; nothing to do unless it comes back",
				"%v rules were changed%s: %v (%s)", fam.Family, by, d.Kind, where)
		}
	}
	return out
}

func nextForRules(family iptables.Family, err error) string {
	switch {
	case errors.Is(err, iptables.ErrLocked):
		return "it is tried again; `lsof /run/xtables.lock` names the program"
	case errors.Is(err, iptables.ErrIncompatible):
		nft := map[iptables.Family]string{iptables.IPv4: "ip", iptables.IPv6: "ip6"}[family]
		return "a program made this table in a form iptables cannot read: `nft list table " + nft +
			" nat` shows it; remove those rules or use one backend"
	case errors.Is(err, iptables.ErrNotRoot):
		return "run as root or with CAP_NET_ADMIN and CAP_NET_RAW"
	}
	return "it is tried again; `modprobe` the match or table it names"
}

var unwritableRE = regexp.MustCompile(`unable to open file '([^']*)': (.*)`)

func rejected(f Facts) (out []Finding) {
	for _, r := range f.Envoy.Rejected {
		if m := unwritableRE.FindStringSubmatch(r.Details); m != nil {
			out = append(out, Finding{ID: AccessLogUnwritable, Row: 11, Severity: Error, Key: r.Name,
				Cause: fmt.Sprintf(
					"Envoy rejected listener %s: it cannot write the access log %s (%s); services new in it are "+
						"not intercepted", r.Name, m[1], m[2]),
				Next: fmt.Sprintf(
					"make %s writable by %s (`ls -ld` tells who owns it now), or choose another access-log path",
					m[1], f.ProxyUser)})
			continue
		}
		out = append(out, Finding{ID: ListenerRejected, Row: 10, Severity: Error, Key: r.Name,
			Cause: fmt.Sprintf("Envoy rejected listener %s: %s; services new in it are not intercepted",
				r.Name, r.Details),
			Next: "correct the configuration at the control plane"})
	}
	return out
}

func attributeBad(f Facts) []Finding {
	if f.Attribute == nil {
		return nil
	}
	next := "correct it"
	if errors.Is(f.Attribute, attribute.ErrMissing) {
		next = "or give this VM one (docs/attribute.md)"
	}
	return one(AttributeBad, 26, Error, next+"; until then "+inForce(f),
		"The gce-service-proxy attribute cannot be used: %v", f.Attribute)
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
	return one(Bootstrap, 26, Error, "", "Bootstrap failed: %s", f.Bootstrap)
}

func metadataServer(f Facts) []Finding {
	if f.Metadata == nil {
		return nil
	}
	return one(MetadataServer, 0, Error, "it is asked again, and until then "+inForce(f)+
		"; check that nothing on the VM blocks 169.254.169.254 or stands before it",
		"The metadata server gives no usable answer about the attribute: %v", f.Metadata)
}

func portClosed(f Facts) (out []Finding) {
	for _, p := range f.Ports {
		if p.Listening || p.Purpose == "admin" {
			continue
		}
		why := "nothing accepts there"
		if p.Err != nil {
			why = p.Err.Error()
		}
		out = append(out, Finding{ID: InterceptionNotReady, Severity: Error, Key: p.Addr.String(),
			Cause: fmt.Sprintf("Envoy's %s port %d does not accept %v connections (%s)", p.Purpose,
				p.Addr.Port(), p.Family, why),
			Next: "see /var/log/envoy/envoy.err.log for a bind error"})
	}
	return out
}

func servingPorts(f Facts) (out []Finding) {
	for _, p := range f.Uncovered {
		out = append(
			out, Finding{ID: ServingPortNoChain, Row: 19, Severity: Warning, Key: strconv.Itoa(int(p)),
				Cause: fmt.Sprintf(
					"Envoy has no inbound listener for port %d yet; its traffic goes to the application directly",
					p),
				Next: "check that the control plane knows this VM's serving port (backend service, endpoint " +
					"policy)"})
	}
	return out
}

func entries(f Facts) (out []Finding) {
	for _, r := range f.Refused {
		out = append(out, Finding{ID: EntryRefused, Severity: Warning, Key: r.Listener + " " + r.Entry,
			Cause: fmt.Sprintf("Listener %s asks for %s, which is never intercepted: %s", r.Listener,
				r.Entry, r.Reason),
			Next: "give the service another address at the control plane"})
	}
	return out
}

func skipped(f Facts) (out []Finding) {
	for _, s := range f.Envoy.Skipped {
		out = append(out, Finding{ID: ListenerSkipped, Severity: Warning, Key: s.Listener,
			Cause: fmt.Sprintf("Listener %s is not intercepted: %s", s.Listener, s.Reason)})
	}
	return out
}

func serverFirst(f Facts) (out []Finding) {
	for _, p := range f.ServerFirst {
		n := strconv.Itoa(int(p))
		out = append(out, Finding{ID: ServerFirst, Row: 22, Severity: Advice, Key: n,
			Cause: "Port " + n +
				" usually speaks a protocol in which the server talks first, which hangs behind an HTTP or " +
				"TLS inspecting listener",
			Next: "set exclude-outbound-port-ranges=" + n})
	}
	return out
}

func others(f Facts) (out []Finding) {
	for _, o := range f.Others {
		out = append(out, Finding{ID: OtherChain, Row: 34, Severity: Advice, Key: fmt.Sprint(o),
			Cause: fmt.Sprintf("Another nat chain may come before ours: %v", o),
			Next:  "check with `nft list ruleset` that it leaves the services' addresses alone"})
	}
	return out
}

func guestOff(f Facts) []Finding {
	if !f.GuestOff {
		return nil
	}
	return one(GuestAttributesOff, 27, Warning,
		"set the metadata enable-guest-attributes=TRUE on the VM",
		"Guest attributes are disabled: nobody outside can read this agent's status")
}

func listenAddress(f Facts) (out []Finding) {
	if f.ListenErr != nil {
		what := "/healthz and /metrics are"
		if f.MetricsApart {
			what = "/healthz is"
		}
		out = one(ListenAddress, 0, Warning,
			"stop the program that holds it or set --listen; interception goes on",
			"%s not served: %v", what, f.ListenErr)
	}
	if f.MetricsErr != nil {
		out = append(out, Finding{ID: ListenAddress, Severity: Warning, Key: "metrics",
			Cause: fmt.Sprintf("/metrics is not served as it should be: %v", f.MetricsErr),
			Next:  "it is tried again every few seconds; interception goes on"})
	}
	return out
}

func logUnreadable(f Facts) []Finding {
	if f.Envoy.LogErr == "" {
		return nil
	}
	return one(LogUnreadable, 0, Warning,
		"make it readable for the agent's user; until then changes are seen up to a second later and "+
			"the control plane's words are not known",
		"Envoy's log cannot be read: %s", f.Envoy.LogErr)
}

func attributeAdvice(f Facts) (out []Finding) {
	for _, text := range f.Advice {
		out = append(out, Finding{ID: AttributeAdvice, Severity: Warning, Key: text,
			Cause: "The gce-service-proxy attribute: " + text, Next: "see docs/attribute.md"})
	}
	return out
}
