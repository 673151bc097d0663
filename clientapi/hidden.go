package clientapi

import (
	"net/http"
	"strings"

	"github.com/getsentry/sentry-go"
	"github.com/gorilla/mux"
)

// hidden keeps the delay ID, which is authority enough for whoever has it, out of the log and out of what Sentry is told:
// both have the path of a request. Whatever is logged gets the path of the route, in which the delay ID has a name.
func hidden(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		url := *req.URL
		url.Path, url.RawPath = publicPath(req), ""
		req = req.WithContext(req.Context()) // a copy
		req.URL, req.RequestURI = &url, url.Path
		req.Header = req.Header.Clone()
		req.Header.Del("Referer")
		if hub := sentry.GetHubFromContext(req.Context()); hub != nil {
			shown := req.WithContext(req.Context()) // a copy without the body, which Sentry would read along
			shown.Body = nil
			hub.Scope().SetRequest(shown)
		}
		next.ServeHTTP(w, req)
	})
}

// publicPath returns the path of a request as its route spells it, with the action if it is one of the known.
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
