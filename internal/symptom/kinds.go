package symptom

// Kind is a kind of finding that Check can make.
type Kind struct {
	ID  ID
	Row int // of docs/symptoms.md, of most of its findings; 0: none
	// Severities are those that its findings can have, the worst first.
	Severities []Severity
	Title      string // what is wrong, in a few words, whatever the details
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
	{EnvoyDown, 1, justError, "Envoy is not running"},
	{EnvoyNotConfigured, 2, justError, "Envoy has not received its configuration"},
	{ControlPlaneLookUp, 3, justError, "The control plane's name does not resolve"},
	{ControlPlaneConnect, 4, justError, "The control plane cannot be reached"},
	{APINotEnabled, 5, justError, "The Traffic Director API is not enabled in the project"},
	{PermissionDenied, 6, justError, "The VM's service account may not ask the control plane"},
	{ScopeMissing, 7, justError, "The VM lacks the scope cloud-platform"},
	{ConfigNotFound, 8, justError, "The control plane has no configuration for this VM"},
	{ControlPlaneRefused, 0, justError, "The control plane ended Envoy's stream"},
	{ListenerRejected, 10, justError, "Envoy rejected a listener"},
	{AccessLogUnwritable, 11, justError, "Envoy cannot write an access log"},
	{DriftRepaired, 13, justWarning, "Rules of ours were changed, and repaired"},
	{ProxyUser, 15, justError, "The user that Envoy runs as does not exist"},
	{FamilyUnusable, 16, []Severity{Error, Warning}, "Rules of one address family cannot be used"},
	{RuleRefused, 17, []Severity{Error, Warning}, "Rules could not be applied"},
	{CouldNotLook, 17, justError, "Rules could not be read"},
	{Shadowed, 18, justError, "A rule of others stands before our jump"},
	{Fight, 18, justError, "Somebody keeps undoing our rules"},
	{ServingPortNoChain, 19, justWarning, "Envoy has no inbound listener for a serving port"},
	{ServerFirst, 22, justAdvice, "A protocol in which the server talks first is inspected"},
	{EnvoyTooOld, 25, []Severity{Error, Advice}, "Envoy is old"},
	{Bootstrap, 26, justError, "Bootstrap failed"},
	{AttributeBad, 26, justError, "The gce-service-proxy attribute cannot be used"},
	{AttributeAdvice, 0, justWarning, "The attribute asks for something that is advised against"},
	{MetadataServer, 0, justError, "The metadata server gives no usable answer"},
	{GuestAttributesOff, 27, justWarning, "Guest attributes are disabled"},
	{ForeignOwner, 32, justError, "Another user holds a port of Envoy's"},
	{OtherChain, 34, justAdvice, "Another nat chain may come before ours"},
	{ResolverLoop, 42, justWarning, "A resolver's own questions go to Envoy's DNS listener"},
	{InterceptionNotReady, 0, justError, "An interception port of Envoy's is closed"},
	{AdminUnreadable, 0, justError, "Envoy's admin interface gives no usable answer"},
	{EntryRefused, 0, justWarning, "A listener asks for what is never intercepted"},
	{ListenerSkipped, 0, justWarning, "A listener is of a shape that is not intercepted"},
	{LogUnreadable, 0, justWarning, "Envoy's log cannot be read"},
	{ListenAddress, 0, justWarning, "/healthz or /metrics is not served as it should be"},
	{Starting, 0, justError, "The agent is only just starting"},
}
