def faults_page(root):
    return ""
