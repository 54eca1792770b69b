package symptom

// Kind is a kind of finding that Check can make.
type Kind struct {
	ID  ID
	Row int // of docs/symptoms.md, of most of its findings; 0: none
	// Severities are those that its findings can have, the worst first.
	Severities []Severity
	Title      string // what is wrong, in a few words, whatever the details
	// Needs is what must have been observed to say that it is not there.
	Needs []Source
}

// Kinds are all kinds, in the order of their IDs in this file. The set is fixed when the program is
// built: a metric has a series for each, and the journal's catalog an entry.
func Kinds() []Kind { return kinds }

var (
	justError   = []Severity{Error}
	justWarning = []Severity{Warning}
	justAdvice  = []Severity{Advice}
)

var kinds = []Kind{
	{EnvoyDown, 1, justError, "Envoy is not running",
		[]Source{FromEnvoy}},
	{EnvoyNotConfigured, 2, justError, "Envoy has not received its configuration",
		[]Source{FromEnvoy}},
	{ControlPlaneLookUp, 3, justError, "The control plane's name does not resolve",
		[]Source{FromEnvoy, FromControlPlane}},
	{ControlPlaneConnect, 4, justError, "The control plane cannot be reached",
		[]Source{FromEnvoy, FromControlPlane}},
	{APINotEnabled, 5, justError, "The Traffic Director API is not enabled in the project",
		[]Source{FromEnvoy, FromEnvoyLog}},
	{PermissionDenied, 6, justError, "The VM's service account may not ask the control plane",
		[]Source{FromEnvoy, FromEnvoyLog}},
	{ScopeMissing, 7, justError, "The VM lacks the scope cloud-platform",
		[]Source{FromEnvoy, FromEnvoyLog, FromMetadata}},
	{ConfigNotFound, 8, justError, "The control plane has no configuration for this VM",
		[]Source{FromEnvoy, FromEnvoyLog}},
	{ControlPlaneRefused, 0, justError, "The control plane ended Envoy's stream",
		[]Source{FromEnvoy, FromEnvoyLog}},
	{ListenerRejected, 10, justError, "Envoy rejected a listener",
		[]Source{FromEnvoy}},
	{AccessLogUnwritable, 11, justError, "Envoy cannot write an access log",
		[]Source{FromEnvoy}},
	{DriftRepaired, 13, justWarning, "Rules of ours were changed, and repaired",
		[]Source{FromAgent}},
	{ProxyUser, 15, justError, "The user that Envoy runs as does not exist",
		[]Source{FromUsers}},
	{FamilyUnusable, 16, []Severity{Error, Warning}, "Rules of one address family cannot be used",
		[]Source{FromKernel}},
	{RuleRefused, 17, []Severity{Error, Warning}, "Rules could not be applied",
		[]Source{FromAgent}},
	{CouldNotLook, 17, justError, "Rules could not be read",
		[]Source{FromKernel}},
	{Shadowed, 18, justError, "A rule of others stands before our jump",
		[]Source{FromKernel}},
	{Fight, 18, justError, "Somebody keeps undoing our rules",
		[]Source{FromAgent}},
	{ServingPortNoChain, 19, justWarning, "Envoy has no inbound listener for a serving port",
		[]Source{FromEnvoy, FromMetadata}},
	{ServerFirst, 22, justAdvice, "A protocol in which the server talks first is inspected",
		[]Source{FromEnvoy}},
	{EnvoyTooOld, 25, []Severity{Error, Advice}, "Envoy is old",
		[]Source{FromEnvoy}},
	{Bootstrap, 26, justError, "Bootstrap failed",
		[]Source{FromState}},
	{AttributeBad, 26, justError, "The gce-service-proxy attribute cannot be used",
		[]Source{FromMetadata}},
	{AttributeAdvice, 0, justWarning, "The attribute asks for something that is advised against",
		[]Source{FromMetadata}},
	{MetadataServer, 0, justError, "The metadata server gives no usable answer",
		[]Source{FromMetadata}},
	{GuestAttributesOff, 27, justWarning, "Guest attributes are disabled",
		[]Source{FromAgent}},
	{ForeignOwner, 32, justError, "Another user holds a port of Envoy's",
		[]Source{FromSockets, FromUsers}},
	{OtherChain, 34, justAdvice, "Another nat chain may come before ours",
		[]Source{FromOthers}},
	{ResolverLoop, 42, justWarning, "A resolver's own questions go to Envoy's DNS listener",
		[]Source{FromSockets, FromMetadata, FromEnvoy}},
	{InterceptionNotReady, 0, justError, "An interception port of Envoy's is closed",
		[]Source{FromSockets, FromEnvoy}},
	{AdminUnreadable, 0, justError, "Envoy's admin interface gives no usable answer",
		[]Source{FromEnvoy}},
	{EntryRefused, 0, justWarning, "A listener asks for what is never intercepted",
		[]Source{FromEnvoy}},
	{ListenerSkipped, 0, justWarning, "A listener is of a shape that is not intercepted",
		[]Source{FromEnvoy}},
	{LogUnreadable, 0, justWarning, "Envoy's log cannot be read",
		[]Source{FromEnvoyLog}},
	{ListenAddress, 0, justWarning, "/healthz or /metrics is not served as it should be",
		[]Source{FromAgent}},
	{Starting, 0, justError, "The agent is only just starting",
		[]Source{FromAgent}},
	{EnvoyOtherUser, 15, justError, "Envoy runs as another user than the rules let out",
		[]Source{FromSockets, FromUsers}},
	{RulesDiffer, 13, justError, "The kernel has not the rules that Envoy needs",
		[]Source{FromKernel, FromEnvoy, FromMetadata, FromUsers}},
	{InputDropped, 20, justWarning, "A firewall rule of this VM drops a serving port",
		[]Source{FromFilter, FromMetadata}},
	{ApplicationSilent, 21, justWarning, "Nothing listens on a serving port",
		[]Source{FromSockets, FromMetadata}},
	{EndpointsPanic, 24, justWarning, "Most endpoints of a cluster are unhealthy",
		[]Source{FromEnvoy, FromClusters}},
	{EndpointsUnhealthy, 31, justAdvice, "Some endpoints of a cluster are unhealthy",
		[]Source{FromEnvoy, FromClusters}},
	{AgentStuck, 28, []Severity{Error, Warning}, "The agent is stuck, or was",
		[]Source{FromAgent}},
	{EnvoyIdentity, 29, []Severity{Error, Warning}, "Envoy presents another network or project",
		[]Source{FromEnvoy, FromMetadata}},
	{ClockWrong, 30, []Severity{Error, Warning}, "The clock of this VM is wrong",
		[]Source{FromMetadata}},
	{OldConnections, 33, justAdvice, "Connections are older than the interception",
		[]Source{FromConntrack, FromSockets, FromEnvoy}},
	{ConntrackFull, 35, []Severity{Error, Warning}, "The connection tracking table is full, or near",
		[]Source{FromConntrack}},
	{NoRoute, 36, justWarning, "There is no route to a service's address",
		[]Source{FromRoutes, FromEnvoy}},
	{EnvoyNotOurs, 37, justError, "The Envoy that runs is not the one that was configured",
		[]Source{FromEnvoy, FromState}},
	{ToolsMissing, 38, justError, "iptables is not on this VM",
		[]Source{FromKernel}},
}
