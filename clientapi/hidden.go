package clientapi

import (
	"net/http"
	"strings"

	"github.com/getsentry/sentry-go"
	"github.com/gorilla/mux"
)

// hidden keeps the delay ID out of the log and out of reports to Sentry, which contain the path of a request. A delay ID is a secret: on
// some paths it is the only authority that an action needs. Logs get the path of the route, with a placeholder for the delay ID.
func hidden(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		url := *req.URL
		url.Path, url.RawPath = publicPath(req), ""
		req = req.WithContext(req.Context()) // a copy
		req.URL, req.RequestURI = &url, url.Path
		req.Header = req.Header.Clone()
		req.Header.Del("Referer")
		if hub := sentry.GetHubFromContext(req.Context()); hub != nil {
			shown := req.WithContext(req.Context()) // a copy without the body, which Sentry would read too
			shown.Body = nil
			hub.Scope().SetRequest(shown)
		}
		next.ServeHTTP(w, req)
	})
}

// publicPath returns the path template of a request's route. If the template has an action and the request's action is known, it is filled
// in.
func publicPath(req *http.Request) string {
	path, err := mux.CurrentRoute(req).GetPathTemplate()
	if err != nil {
		return "" // only for routes without a path
	}
	switch action := mux.Vars(req)["action"]; action {
	case "restart", "send", "cancel":
		path = strings.Replace(path, "{action}", action, 1)
	}
	return path
}
