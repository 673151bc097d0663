// Package delayid tells the senders of delayed events, in what Dendrite answers them, which delay IDs their events had.
package delayid

import (
	"bytes"
	"context"
	"net/http"
	"path"
	"strconv"
	"strings"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/clientapi/auth"
	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/sirupsen/logrus"
)

// Sent knows the delayed events that were sent, for as long as they can be looked up. An event must be known before the
// roomserver is given it: the sync that waits for it answers at once.
type Sent interface {
	// AnySent reports whether there are any, and HasSent whether the user has. Both are asked for almost every answer that
	// has events, and must be cheap.
	AnySent() bool
	HasSent(userID string) bool
	// DelayIDs returns the delay IDs of those of the events that the user sent as delayed events, by event ID. It is given
	// each event ID once.
	DelayIDs(ctx context.Context, userID string, eventIDs []string) (map[string]string, error)
}

// eventPaths are the requests whose answers tell the sender of a delayed event its delay ID, behind the version of the
// client API.
var eventPaths = []string{"sync", "rooms/*/messages", "rooms/*/event/*", "rooms/*/context/*"}

// Add returns a middleware for the router of the client API. To what Dendrite answers a user it adds the delay IDs
// of the events that this user sent as delayed events. All other answers go through it as they are written.
func Add(sent Sent, userAPI userapi.QueryAcccessTokenAPI) mux.MiddlewareFunc {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method != http.MethodGet || !answersEvents(req.URL.EscapedPath()) {
				next.ServeHTTP(w, req)
				return
			}
			a := &answer{ResponseWriter: w, req: req, sent: sent, userAPI: userAPI}
			next.ServeHTTP(a, req)
			a.finish()
		})
	}
}

// answersEvents reports whether the answers to requests for a path, as it was written, are looked at.
func answersEvents(escapedPath string) bool {
	rest, ok := strings.CutPrefix(escapedPath, httputil.PublicClientPathPrefix)
	if !ok {
		return false
	}
	version, rest, _ := strings.Cut(rest, "/")
	if version != "v3" && version != "r0" {
		return false
	}
	for _, pattern := range eventPaths {
		if matches, _ := path.Match(pattern, rest); matches {
			return true
		}
	}
	return false
}

// answer is what a handler writes. Whether it is held back is decided when the handler begins to write and not before: a
// sync may wait for the very event that makes the requester one who has sent a delayed event.
type answer struct {
	http.ResponseWriter
	req     *http.Request
	sent    Sent
	userAPI userapi.QueryAcccessTokenAPI

	begun bool
	// held has the body of an answer to userID, and is nil if the answer goes through.
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

// Flush is http.Flusher. What is held back stays until it is whole.
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

// concerned reports whether there may be something to add to the answer, and finds out for whom.
func (a *answer) concerned() bool {
	if !a.sent.AnySent() || a.req.Context().Err() != nil {
		return false
	}
	header := a.Header()
	if !strings.HasPrefix(header.Get("Content-Type"), "application/json") || header.Get("Content-Encoding") != "" {
		return false
	}
	// The handler has done this too, but tells nobody what it found.
	device, err := auth.VerifyUserFromRequest(a.req, a.userAPI)
	if err != nil {
		return false
	}
	a.userID = device.UserID
	return a.sent.HasSent(a.userID)
}

// finish writes what was held back.
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
