// Package delayid adds unsigned.delay_id to events in Dendrite's answers, so that the sender of a delayed event recognises it.
package delayid

import (
	"bytes"
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/clientapi/auth"
	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/sirupsen/logrus"
)

// Sent knows the sent delayed events for as long as they can be looked up. An event must be known before the roomserver gets it, because
// a waiting sync answers at once.
type Sent interface {
	// AnySent reports whether there are sent delayed events, and HasSent whether a user has sent one. Both are called for almost every
	// answer with events, and must be cheap.
	AnySent() bool
	HasSent(userID string) bool
	// DelayIDs returns the delay IDs of the events that the user sent as delayed events, by event ID. Each event ID is given once.
	DelayIDs(ctx context.Context, userID string, eventIDs []string) (map[string]string, error)
}

// eventPaths are the paths whose answers get delay IDs, by the method of the request, without the prefix and the version of the client API.
// A path of a room stands for the paths below it too. Dendrite answers 404 to paths and versions that it does not serve; errors pass through.
var eventPaths = map[string][]string{
	http.MethodGet: {
		"sync", "rooms/*/messages", "rooms/*/event", "rooms/*/context", "rooms/*/relations", "rooms/*/members", statePath,
	},
	http.MethodPost: {"search", "event_relationships"}, // the second is MSC2836
}

// statePath is the path of a room's state. Below it the answer is an event only with ?format=event.
const statePath = "rooms/*/state"

// Add returns a middleware for the router of the client API. It adds the delay IDs of the events that the requester sent as delayed
// events. All other answers pass through unchanged, without being held back.
func Add(sent Sent, userAPI userapi.QueryAcccessTokenAPI) mux.MiddlewareFunc {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if !answersEvents(req) {
				next.ServeHTTP(w, req)
				return
			}
			a := &answer{ResponseWriter: w, req: req, sent: sent, userAPI: userAPI}
			next.ServeHTTP(a, req)
			a.finish()
		})
	}
}

// answersEvents reports whether the answer to a request may get delay IDs.
func answersEvents(req *http.Request) bool {
	// The path stays escaped, because an ID may contain a slash.
	name, ok := strings.CutPrefix(req.URL.EscapedPath(), httputil.PublicClientPathPrefix)
	if !ok {
		return false
	}
	_, name, _ = strings.Cut(name, "/") // the version
	below := ""
	if ofRoom, ok := strings.CutPrefix(name, "rooms/"); ok {
		_, name, _ = strings.Cut(ofRoom, "/")
		name, below, _ = strings.Cut(name, "/")
		name = "rooms/*/" + name
	}
	if !slices.Contains(eventPaths[req.Method], name) {
		return false
	}
	if name == statePath && below != "" {
		// Otherwise the answer is the content of an event, in which any client can write what looks like an event.
		return req.URL.Query().Get("format") == "event"
	}
	return true
}

// answer is a response writer that may hold the answer back. It decides this only when the handler begins to write, because a sync may wait
// for the first delayed event that the requester sends.
type answer struct {
	http.ResponseWriter
	req     *http.Request
	sent    Sent
	userAPI userapi.QueryAcccessTokenAPI

	begun bool
	// held has the body so far. It is nil if the answer passes through. userID, the requester, is set only with held.
	held   *bytes.Buffer
	userID string
}

func (a *answer) WriteHeader(code int) {
	if !a.begun {
		a.begun = true
		if code == http.StatusOK && a.concerned() {
			a.held = &bytes.Buffer{}
		}
	}
	if a.held == nil {
		a.ResponseWriter.WriteHeader(code)
	}
}

func (a *answer) Write(data []byte) (int, error) {
	if !a.begun {
		a.WriteHeader(http.StatusOK)
	}
	if a.held != nil {
		return a.held.Write(data)
	}
	return a.ResponseWriter.Write(data)
}

// Flush implements http.Flusher. An answer that is held back stays so until it is complete.
func (a *answer) Flush() {
	if !a.begun {
		a.WriteHeader(http.StatusOK)
	}
	if a.held == nil {
		_ = http.NewResponseController(a.ResponseWriter).Flush()
	}
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// concerned reports whether the answer may need delay IDs, and sets userID.
func (a *answer) concerned() bool {
	if !a.sent.AnySent() || a.req.Context().Err() != nil {
		return false
	}
	header := a.Header()
	if !strings.HasPrefix(header.Get("Content-Type"), "application/json") || header.Get("Content-Encoding") != "" {
		return false
	}
	// The handler has verified the user too, but does not expose the result.
	device, err := auth.VerifyUserFromRequest(a.req, a.userAPI)
	if err != nil {
		return false
	}
	a.userID = device.UserID
	return a.sent.HasSent(a.userID)
}

// finish writes an answer that was held back, with delay IDs.
func (a *answer) finish() {
	if a.held == nil {
		return
	}
	body, err := addDelayIDs(a.req.Context(), a.sent, a.userID, a.held.Bytes())
	if err != nil && a.req.Context().Err() == nil {
		logrus.WithError(err).WithField("user_id", a.userID).Error("Failed to look up the delay IDs of events")
	}
	if header := a.Header(); header.Get("Content-Length") != "" {
		header.Set("Content-Length", strconv.Itoa(len(body)))
	}
	a.ResponseWriter.WriteHeader(http.StatusOK)
	_, _ = a.ResponseWriter.Write(body)
}
