package symptom

import (
	"slices"
	"time"
)

// follows says of each finding that follows from others which these are: the first of them that is
// there is its reason. A reason stands further down in this table than all that follows from it, or
// not in it at all, so there is no circle.
var follows = []struct {
	from []ID
	what []ID
}{
	// Envoy does not get what it could make listeners of, or is not the one that should.
	{noConfiguration, []ID{EnvoyNotConfigured}},
	{slices.Concat(noEnvoy, noConfiguration), []ID{InterceptionNotReady, ServingPortNoChain}},
	// Who asks in another's name, or another control plane, gets another answer.
	{[]ID{EnvoyNotOurs, EnvoyIdentity}, []ID{ConfigNotFound, PermissionDenied, APINotEnabled}},
	{[]ID{EnvoyNotOurs}, []ID{EnvoyIdentity}},
	// See fits.
	{[]ID{EnvoyDown}, []ID{ControlPlaneRefused}},
	{[]ID{ClockWrong}, []ID{ControlPlaneConnect}},
	// Without the tools no rules, whatever else.
	{[]ID{ToolsMissing}, []ID{FamilyUnusable, RuleRefused, CouldNotLook}},
	{[]ID{ToolsMissing, ForeignOwner, EnvoyOtherUser, AgentStuck, ClosedAgentHere}, []ID{RulesDiffer}},
	// Two agents write the same rules, each with an Envoy of its own: see fits.
	{[]ID{ClosedAgentHere}, []ID{Fight, EnvoyNotOurs}},
	// Whoever has turned interception off knows that nothing is intercepted: see portClosed.
	{[]ID{InterceptionOff}, []ID{InterceptionNotReady, ServingPortNoChain}},
}

var (
	noEnvoy         = []ID{ForeignOwner, EnvoyOtherUser, EnvoyDown}
	noConfiguration = []ID{ControlPlaneLookUp, ControlPlaneConnect, APINotEnabled, PermissionDenied,
		ScopeMissing, ConfigNotFound, ControlPlaneRefused, ListenerRejected, AccessLogUnwritable,
		EnvoyNotOurs, EnvoyIdentity, ForeignOwner, EnvoyOtherUser}
)

// explain lists what follows from another finding under it. Whatever counts as an error counts
// once: so a reason is never milder than what it explains.
func explain(f Facts, all []Finding) {
	worst, since := map[ID]Severity{}, map[ID]time.Time{}
	for _, found := range all {
		worst[found.ID] = max(worst[found.ID], found.Severity)
		since[found.ID] = found.Since
	}
	for i := range all {
		for _, rule := range follows {
			if all[i].ExplainedBy != "" || !slices.Contains(rule.what, all[i].ID) {
				continue
			}
			for _, reason := range rule.from {
				severity, there := worst[reason]
				if there && severity >= all[i].Severity && fits(f, reason, since[reason], all[i]) {
					all[i].ExplainedBy = reason
					break
				}
			}
		}
	}
}

// atItsEnd is how long before nothing answers any more an Envoy that ends closes its stream.
const atItsEnd = 5 * time.Second

// fits says whether the facts bear it out where two findings can be there for themselves; since is
// when the reason began.
func fits(f Facts, reason ID, since time.Time, what Finding) bool {
	switch {
	case reason == EnvoyDown && what.ID == ControlPlaneRefused:
		// Envoy logs the end of its stream as it ends itself, in words as if another had closed it.
		return !since.IsZero() && slices.ContainsFunc(what.Evidence, func(e Evidence) bool {
			return e.Source == FromEnvoyLog && since.Sub(e.Time).Abs() < atItsEnd
		})
	case reason == ClockWrong && what.ID == ControlPlaneConnect:
		return failsTLS(f)
	case reason == ClosedAgentHere && what.ID == Fight:
		// Its processes are hidden from the daemon: that its unit is meant to start must do.
		return f.ClosedAgent.runs()
	case reason == ClosedAgentHere: // what only lies there does nothing
		return f.ClosedAgent != nil && f.ClosedAgent.Process != ""
	}
	return true
}
