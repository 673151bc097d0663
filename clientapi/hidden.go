package clientapi

import (
	"net/http"
	"strings"

	"github.com/getsentry/sentry-go"
	"github.com/gorilla/mux"
)

// hidden keeps delay IDs out of the log, which has the path of a request, and out of reports to Sentry, which have path, query and body. A
// delay ID is a secret: on some paths it is the only authority that an action needs. Log and reports get the path of the route, with a
// placeholder for the delay ID.
func hidden(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		url := *req.URL
		url.Path, url.RawPath = publicPath(req), ""
		req = req.WithContext(req.Context()) // a copy
		req.URL, req.RequestURI = &url, url.Path
		req.Header = req.Header.Clone()
		req.Header.Del("Referer")
		if hub := sentry.GetHubFromContext(req.Context()); hub != nil {
			shown, shownURL := req.WithContext(req.Context()), url // copies
			shownURL.RawQuery = ""
			shown.URL, shown.Body = &shownURL, nil
			hub.Scope().SetRequest(shown)
			hub.Scope().SetTransaction(req.Method + " " + url.Path)
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
	if action := mux.Vars(req)["action"]; isAction(action) {
		path = strings.Replace(path, "{action}", action, 1)
	}
	return path
}
