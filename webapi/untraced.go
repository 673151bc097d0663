// Package webapi is what our HTTP routes share: bodies bounded in size and time, handlers whose requests and answers never get into the log,
// and one answer for each kind of bad request.
package webapi

import (
	"fmt"
	"net/http"
	"net/url"

	"github.com/getsentry/sentry-go"
	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/clientapi/auth"
	"github.com/matrix-org/dendrite/internal"
	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
)

// Untraced returns a handler like that of Dendrite's MakeExternalAPI, except that it never writes whole requests and answers into the
// log, which Dendrite does if DENDRITE_TRACE_HTTP is set. The requests and answers here contain tokens.
func Untraced(name string, f func(*http.Request) util.JSONResponse) http.Handler {
	handler := util.MakeJSONAPI(util.NewJSONRequestHandler(f))
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		task, ctx := internal.StartTask(req.Context(), name)
		defer task.EndTask()
		handler.ServeHTTP(w, req.WithContext(ctx))
	})
}

// Authenticated is Untraced for requests with an access token, also of guests. As Dendrite's MakeAuthAPI does, it adds the user to
// the log, and reports answers of 500 and above to Sentry, but without the answer. It passes the decoded parts of the path.
//
// A malformed query is refused. Go would drop the malformed parameter, so an event with a malformed delay would be sent at once. A user
// without a server is refused too: Dendrite lets an application service name one, and its SendEvent panics.
func Authenticated(
	name string, userAPI userapi.QueryAcccessTokenAPI, f func(*http.Request, *userapi.Device, map[string]string) util.JSONResponse,
) http.Handler {
	return Untraced(name, func(req *http.Request) util.JSONResponse {
		device, refused := auth.VerifyUserFromRequest(req, userAPI)
		if refused != nil {
			if refused.Code == http.StatusInternalServerError { // Dendrite's own answer has no errcode
				refused.JSON = spec.Unknown("Internal server error")
			}
			return *refused
		}
		if _, err := url.ParseQuery(req.URL.RawQuery); err != nil {
			return BadRequest(spec.InvalidParam("The query is malformed")).Response()
		}
		if _, err := spec.NewUserID(device.UserID, true); err != nil {
			return BadRequest(spec.BadJSON("user_id must be a user ID")).Response()
		}
		vars, err := httputil.URLDecodeMapValues(mux.Vars(req))
		if err != nil {
			return util.ErrorResponse(err)
		}
		logger := util.GetLogger(req.Context()).WithField("user_id", device.UserID)
		answer := f(req.WithContext(util.ContextWithLogger(req.Context(), logger)), device, vars)
		if hub := sentry.GetHubFromContext(req.Context()); hub != nil && answer.Code >= http.StatusInternalServerError {
			hub.CaptureException(fmt.Errorf("%s returned HTTP %d", name, answer.Code))
		}
		return answer
	})
}
