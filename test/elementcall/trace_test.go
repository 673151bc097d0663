//go:build all

package elementcall

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/stretchr/testify/require"
)

// refusals are the requests that the homeserver may answer with an error, and the reasons.
var refusals = map[string]string{
	"POST /_matrix/client/v3/register 401":                                          "how to register: the client asks without saying how, and is told",
	"POST /_matrix/client/v3/register 403":                                          "the same where registration is disabled: the login page asks, too",
	"GET /_matrix/client/v3/room_keys/version 404":                                  "a key backup, which the user does not have",
	"POST " + delegatePath + " 401":                                                 "whether the homeserver takes leave events: asked without a login, and any answer but 404 is a yes",
	"POST " + delegatePath + nowhere + " 404":                                       hidden,
	"POST " + delegateToIt + " 400":                                                 "the same of the service, asked without a body",
	"POST " + delegateToIt + nowhere + " 404":                                       hidden,
	"POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/…/restart 404": sentAlready,
	"POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/…/cancel 404":  sentAlready,
}

// sentAlready is the reason why a delayed event is not found. On a slow machine connections break, so that a participant counts as gone
// and then joins again.
const sentAlready = "a leave event that was sent; the client joins again"

// delegatePath is where the homeserver takes leave events, and delegateToIt where the service does that it serves.
const (
	delegatePath = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave"
	delegateToIt = "/_matrix/client/unstable/io.element.msc4195/livekit/delegate_delayed_leave"
	hidden       = "the test hides that the server takes leave events"
	// nowhere makes a path one that the homeserver does not have.
	nowhere = "/none"
)

// trace is a proxy in front of a homeserver that counts requests and answers.
type trace struct {
	mu     sync.Mutex
	counts map[asked]int
}

// asked is a kind of request, and the answer's status.
type asked struct {
	request string
	status  int
}

// newTrace starts a trace. When the test ends, it prints the table of errors. An error that is not among the refusals fails the test. With
// noDelegation the trace itself answers requests that hand over leave events, as a server does that takes none.
func newTrace(t *testing.T, homeserver, address string, noDelegation bool) *trace {
	t.Helper()
	target, err := url.Parse(homeserver)
	require.NoError(t, err)
	tr := &trace{counts: map[asked]int{}}
	proxy := &httputil.ReverseProxy{
		ErrorLog: log.New(io.Discard, "", 0), // a crashed browser aborts its requests
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
			r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
			if noDelegation && strings.HasSuffix(r.In.URL.Path, "/delegate_delayed_leave") {
				r.Out.URL.Path += nowhere
			}
		},
		ModifyResponse: func(res *http.Response) error {
			if res.Request.Method == http.MethodOptions && res.StatusCode == http.StatusOK {
				return nil // preflight requests are not counted
			}
			tr.mu.Lock()
			defer tr.mu.Unlock()
			tr.counts[asked{kind(res.Request), res.StatusCode}]++
			return nil
		},
	}
	l, err := net.Listen("tcp", address)
	require.NoError(t, err)
	server := &http.Server{Handler: proxy}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() {
		_ = server.Close()
		tr.check(t)
	})
	return tr
}

var (
	// identifier matches a variable part of a path, such as the ID of a room, a user, a transaction or a media file.
	identifier = regexp.MustCompile(`^[!@$#_].*|^m\d+\..*|^\d+$|^[A-Za-z0-9_-]{16,}$`)
	word       = regexp.MustCompile(`^[a-z_-]+$`)
)

// kind returns the request without its variable parts.
func kind(r *http.Request) string {
	parts := strings.Split(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
	for i, part := range parts {
		if part, err := url.PathUnescape(part); err == nil && identifier.MatchString(part) && (!word.MatchString(part) || part[0] == '_' && i > 0) {
			parts[i] = "…"
		}
	}
	request := r.Method + " /" + strings.Join(parts, "/")
	for key := range r.URL.Query() {
		if strings.HasPrefix(key, "org.matrix.") {
			request += "?" + key
		}
	}
	return request
}

// check prints the counted requests, and requires that all errors are among the refusals.
func (tr *trace) check(t *testing.T) {
	t.Helper()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	var all []asked
	for a := range tr.counts {
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b asked) int {
		if a.status != b.status {
			return b.status - a.status
		}
		return strings.Compare(a.request, b.request)
	})
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, a := range all {
		reason := ""
		if a.status >= http.StatusBadRequest {
			known := false
			if reason, known = refusals[fmt.Sprint(a.request, " ", a.status)]; !known {
				reason = "NOT EXPECTED"
				t.Errorf("%s was answered with %d", a.request, a.status)
			}
		}
		fmt.Fprintf(w, "%d\t%d times\t%s\t%s\n", a.status, tr.counts[a], a.request, reason)
	}
	require.NoError(t, w.Flush())
	t.Logf("what the homeserver was asked:\n%s", &table)
}
